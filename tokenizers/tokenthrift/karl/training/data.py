"""Images for training: arrays mapped from disk, or folders of image files.

A source is a `.npy` array, uint8 `(N, 3, height, width)`, as `recipes/karl/pack.py` writes it, or a folder that is
searched for images. Training images are cropped at random and mirrored (KARL's own augmentation: an area of 80 to 100
per cent), others are the middle square. What is random about an image, its view and everything that a training step
draws for it, depends on the seed, the epoch and the image alone.

What differs from the published loader: a file that cannot be read is reported once and left out, where torchvision's
`ImageFolder` ends the run; several processes share an epoch, and a resumed run goes on with the images that were left.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenthrift.media.files import InputError, find_files
from tokenthrift.media.image import ImageError, read_image, square
from tokenthrift.media.suffixes import IMAGE_SUFFIXES
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import Key, item_seed, random_batches

__all__ = ["ImageBatch", "Images", "KarlDataModule", "collate", "random_view", "source_name"]


class ImageBatch(NamedTuple):
    """What a batch holds."""

    images: Tensor
    """`(B, 3, size, size)` in [0, 1]."""
    seeds: tuple[int, ...]
    """One for each image, from which a training step draws what is random about it."""


def random_view(image: Tensor, size: int, area: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A random square of an image, mirrored half of the time.

    Args:
        image: `(3, H, W)`.
        size: side of the result.
        area: least and greatest share of the largest square's area.
        rng: draws the square.

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
    """Images of several sources, by keys `(epoch, index)`; each as `(image, seed)`, or None if it cannot be read.

    Args:
        sources: arrays or folders, and how often each of their images is in an epoch.
        size: side of the images given, in pixels.
        area: see `random_view`; None takes the middle square.
        seed: of what is random about the images.
    """

    def __init__(self, sources: Mapping[str, int], size: int, area: tuple[float, float] | None, seed: int = 0) -> None:
        self.size, self.area, self.seed, self.sources = size, area, seed, list(sources)
        self.parts: list[Any] = [_open(Path(name)) for name in sources]
        starts = np.cumsum([0, *map(len, self.parts)])
        self.starts = starts
        # Which image each index of an epoch is.
        self.order = np.concatenate(
            [
                np.tile(np.arange(start, end), times)
                for start, end, times in zip(starts[:-1], starts[1:], sources.values(), strict=True)
            ]
        )
        self.reported: set[Path] = set()

    def __len__(self) -> int:
        """Images of an epoch."""
        return len(self.order)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | None:
        epoch, index = key
        image, seed = self._read(self._item(index)), item_seed(self.seed, epoch, index)
        if image is None:
            return None
        if self.area is None:
            return square(image, self.size), seed
        return random_view(image, self.size, self.area, np.random.default_rng(seed)), seed

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int] | None]:
        """A batch; if no file of it can be read, the next image that can is taken."""
        found = [self[key] for key in keys]
        if not any(item is not None for item in found):
            # The last batch of an epoch may be one broken file, and other processes wait for this one's share.
            epoch, index = keys[0]
            others = (self[epoch, (index + step) % len(self)] for step in range(1, len(self)))
            found = list(islice((item for item in others if item is not None), 1)) or found
        return found

    def readable(self, most: int) -> None:
        """Keeps the first images that can be read, and reports the files before them that cannot."""

        def whole(index: int) -> bool:
            item = self._item(index)
            return not isinstance(item, Path) or self._read(item) is not None

        kept = list(islice(filter(whole, range(len(self))), most))
        if not kept:
            raise ValueError(f"none of the {len(self)} images of {', '.join(self.sources)} could be read")
        self.order = self.order[kept]

    def _item(self, index: int) -> Any:
        image = int(self.order[index])
        part = int(np.searchsorted(self.starts, image, "right")) - 1
        return self.parts[part][image - self.starts[part]]

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
    try:
        found = find_files([str(source)], IMAGE_SUFFIXES, "image")
    except InputError as error:
        raise FileNotFoundError(f"no image in this folder: {error} ({', '.join(sorted(IMAGE_SUFFIXES))})") from error
    if remark := found.remark("rename them to be read"):
        warnings.warn(remark, stacklevel=2)
    return [file.path for file in found]


def source_name(trainer: Any, part: str, loader: int) -> str:
    """What logged values of a loader are called: its source's name, or its number with other data.

    Args:
        trainer: with the data module, if there is one.
        part: "val" or "test".
        loader: its number.
    """
    names: list[str] = getattr(trainer.datamodule, "names" if part == "val" else "test_names", [])
    return names[loader] if names else str(loader)


def collate(items: Sequence[tuple[Tensor, int] | None]) -> ImageBatch:
    """Those that could be read.

    Raises:
        ValueError: none could be.
    """
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError(f"none of the {len(items)} images of a batch could be read")
    return ImageBatch(torch.stack([image for image, _ in found]), tuple(seed for _, seed in found))


class KarlDataModule(ResumableDataModule):
    """Images for training, development and test. A batch is an `ImageBatch`: `images` and `seeds`.

    `images` is `(B, 3, size, size)` in [0, 1], as `Karl.encode` takes them; `seeds` has one number for each image. With
    several processes every image of an epoch goes to one of them.

    Args:
        train: sources to train on, and how often each of their images is in an epoch.
        dev: sources to validate on, by the name that logged values carry.
        test: the same for `tokenthrift test`.
        size: side of the images, in pixels.
        batch_size: images a batch, of each process.
        area: least and greatest share of an image that a training crop covers.
        workers: processes that read images; 0 reads in the training process.
        dev_images: most images of each source to validate or test on.
        seed: of order, crops and all else that is random about an image.
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
        self.dev = {name: Images({source: 1}, h.size, None) for name, source in (h.dev or {}).items()}
        self.test = {name: Images({source: 1}, h.size, None) for name, source in (h.test or {}).items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """`ImageBatch`es in random order."""
        h: Any = self.hparams
        sampler = random_batches(range(len(self.train)), h.batch_size, seed=h.seed)
        return self.training_loader(self.train, sampler, collate, h.workers)

    def training_images(self, count: int) -> Tensor:
        """Some images of the first epoch, `(N, 3, size, size)`, the same in every process; for statistics."""
        some = np.random.default_rng(self.hparams["seed"]).permutation(len(self.train))[:count]
        return collate([self.train[0, int(index)] for index in some]).images

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
        images.readable(h.dev_images)
        return self.evaluation_loader(images, h.batch_size, collate)
