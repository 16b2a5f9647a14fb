"""Images for training: arrays mapped from disk, or folders of image files, in an order that a resumed run takes up.

A source is a `.npy` array, uint8 `(N, 3, height, width)`, as `recipes/karl/pack.py` writes it, or a folder that is
searched for images. Training images are cropped at random and mirrored (KARL's own augmentation: an area of 80 to 100
per cent), others are the middle square. What is random about an image depends on the seed and on how many images were
drawn before it, not on any global state.

What differs from the published loader: a file that cannot be read is reported once and left out, where torchvision's
`ImageFolder` ends the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenthrift.media.image import ImageError, read_image, square
from tokenthrift.training.resuming import ResumableDataModule

__all__ = ["Draws", "Images", "KarlDataModule", "random_view", "source_name"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def random_view(image: Tensor, size: int, area: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A random square of an image, mirrored half of the time.

    Args:
        image: `(3, H, W)`.
        size: side of the result.
        area: least and greatest share of the largest square's area.
        rng: where the randomness comes from.

    Returns:
        `(3, size, size)`.
    """
    height, width = image.shape[1:]
    side = max(1, round(min(height, width) * float(rng.uniform(*area)) ** 0.5))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    view = image[:, top : top + side, left : left + side]
    if rng.random() < 0.5:
        view = view.flip(-1)
    if side != size:
        view = F.interpolate(view[None], (size, size), mode="bilinear", antialias=side > size)[0]
    return view


class Images(Dataset[Any]):
    """Images of several sources, by `(index, draw)`.

    Args:
        sources: arrays or folders, and how often each of their images is in an epoch.
        size: side of the images given, in pixels.
        area: see `random_view`; None takes the middle square.
        seed: of the random views.
    """

    def __init__(self, sources: dict[str, int], size: int, area: tuple[float, float] | None, seed: int = 0) -> None:
        self.size, self.area, self.seed, self.sources = size, area, seed, list(sources)
        self.parts: list[Any] = [_open(Path(name)) for name in sources]
        lengths = [len(part) for part in self.parts]
        self.starts = np.cumsum([0, *lengths])
        self.epoch = np.concatenate(
            [
                np.tile(np.arange(start, start + length), times)
                for start, length, times in zip(self.starts, lengths, sources.values(), strict=False)
            ]
        )
        self.reported: set[Path] = set()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, place: tuple[int, int]) -> Tensor | None:
        index, draw = place
        image = self._read(self._item(index))
        if image is None:
            return None
        if self.area is None:
            return square(image, self.size)
        return random_view(image, self.size, self.area, np.random.default_rng((self.seed, draw)))

    def readable(self, index: int) -> bool:
        """Whether there is an image behind an index; reports a file that holds none."""
        item = self._item(index)
        return not isinstance(item, Path) or self._read(item) is not None

    def _item(self, index: int) -> Any:
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.parts[part][index - self.starts[part]]

    def _read(self, item: Any) -> Tensor | None:
        if not isinstance(item, Path):
            return torch.from_numpy(np.array(item)).float() / 255
        try:
            return read_image(item)
        except ImageError as error:
            if item not in self.reported:
                warnings.warn(f"left out: {error}", stacklevel=2)
            self.reported.add(item)
            return None


def _open(source: Path) -> Any:
    """The images of a source: an array on disk, or paths."""
    if source.suffix == ".npy":
        array = np.load(source, mmap_mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3:
            raise ValueError(f"{source} holds {array.dtype} {array.shape}; uint8 (N, 3, height, width) is needed")
        return array
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no array (.npy) and no folder of images; see recipes/karl/README.md")
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{source}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    return paths


def source_name(trainer: Any, part: str, loader: int) -> str:
    """What logged values of a loader are called: its source's name, or its number with other data.

    Args:
        trainer: with the data module, if there is one.
        part: "val" or "test".
        loader: its number.
    """
    names: list[str] = getattr(trainer.datamodule, "names" if part == "val" else "test_names", [])
    return names[loader] if names else str(loader)


def collate(images: list[Tensor | None]) -> Tensor:
    """`(B, 3, size, size)` of those that could be read.

    Raises:
        ValueError: none could be.
    """
    whole = [image for image in images if image is not None]
    if not whole:
        raise ValueError(f"none of the {len(images)} images of a batch could be read")
    return torch.stack(whole)


class Draws(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, draw)`, in a new seeded order each epoch.

    Args:
        epoch: index of every image of an epoch, an array.
        batch_size: images a batch; what is left over at the end of an epoch is dropped.
        seed: of the order.
        rank: which of the processes that train together this is.
        world: how many there are; each gets other images.
    """

    def __init__(self, epoch: Any, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if len(epoch) < batch_size * world:
            raise ValueError(f"a batch of {batch_size * world} is more than the {len(epoch)} images there are")
        self.indices, self.batch_size, self.seed, self.rank, self.world = epoch, batch_size, seed, rank, world
        self.number = self.skip = 0

    def __len__(self) -> int:
        return len(self.indices) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.number)).permutation(self.indices)
        draw, skip = self.number * len(order), self.skip
        self.number, self.skip = self.number + 1, 0
        for i in range(skip, len(self)):
            first = (i * self.world + self.rank) * self.batch_size
            yield [(int(order[p]), draw + p) for p in range(first, first + self.batch_size)]


class KarlDataModule(ResumableDataModule):
    """Images for training, development and test.

    Args:
        train: sources to train on, and how often each of their images is in an epoch.
        dev: sources to validate on, by the name that logged values carry.
        test: the same for `tokenthrift test`.
        size: side of the images, in pixels.
        batch_size: images a batch, of each process; several need `use_distributed_sampler: false`.
        area: least and greatest share of an image that a training crop covers.
        workers: processes that read images; 0 reads in the training process.
        dev_images: most images of each source to validate or test on.
        seed: of order and crops.
    """

    def __init__(
        self,
        train: dict[str, int],
        dev: dict[str, str] | None = None,
        test: dict[str, str] | None = None,
        size: int = 256,
        batch_size: int = 64,
        area: tuple[float, float] = (0.8, 1.0),
        workers: int = 0,
        dev_images: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the sources that the stage needs."""
        h: Any = self.hparams
        if stage == "fit":
            self.train = Images(h.train, h.size, tuple(h.area), h.seed)
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            self.draws = Draws(self.train.epoch, h.batch_size, h.seed, rank, world)
        self.dev = {name: Images({source: 1}, h.size, None) for name, source in (h.dev or {}).items()}
        self.test = {name: Images({source: 1}, h.size, None) for name, source in (h.test or {}).items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches `(B, 3, size, size)` in [0, 1]."""
        h: Any = self.hparams
        self.draws.number, self.draws.skip = divmod(self.consumed, len(self.draws))
        workers = {"num_workers": h.workers, "persistent_workers": h.workers > 0}
        return DataLoader(self.train, batch_sampler=self.draws, collate_fn=collate, **workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each source, in the order of `names`."""
        return [self._plain(images) for images in self.dev.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """As for validation."""
        return [self._plain(images) for images in self.test.values()]

    @property
    def names(self) -> list[str]:
        """What the development sources are called."""
        return list(self.hparams["dev"] or {})

    @property
    def test_names(self) -> list[str]:
        """What the test sources are called."""
        return list(self.hparams["test"] or {})

    def _plain(self, images: Images) -> DataLoader[Any]:
        h: Any = self.hparams
        # A file that cannot be read has to go before there are batches: it may be the only one of the last.
        places = list(islice(((i, 0) for i in range(len(images)) if images.readable(i)), h.dev_images))
        if not places:
            raise ValueError(f"none of the {len(images)} images of {', '.join(images.sources)} could be read")
        batches = [places[i : i + h.batch_size] for i in range(0, len(places), h.batch_size)]
        return DataLoader(images, batch_sampler=batches, collate_fn=collate)
