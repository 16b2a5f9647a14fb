"""Training images: arrays and folders, corrupt files, an order that can be taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenthrift.karl.training.data import ImageBatch, Images, KarlDataModule, collate, random_view


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Twelve images, the n-th all of value 20 n."""
    array = np.broadcast_to(20 * np.arange(12, dtype=np.uint8)[:, None, None, None], (12, 3, 16, 16))
    np.save(tmp_path / "images.npy", array)
    return tmp_path / "images.npy"


def epoch(data: KarlDataModule) -> list[torch.Tensor]:
    return [batch.images for batch in data.train_dataloader()]


def same(one: ImageBatch, other: ImageBatch) -> bool:
    return torch.equal(one.images, other.images) and one.seeds == other.seeds


def test_every_image_is_in_an_epoch_as_often_as_its_source_says(pack: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "more.npy", np.full((2, 3, 16, 16), 255, dtype=np.uint8))
    data = KarlDataModule({str(pack): 1, str(tmp_path / "more.npy"): 3}, size=16, batch_size=6)
    data.setup("fit")
    values = torch.cat(epoch(data))[:, 0, 0, 0] * 255
    assert sorted(values.round().int().tolist()) == [20 * n for n in range(12)] + [255] * 6


def test_order_and_views_change_with_the_epoch_and_are_the_same_again(pack: Path) -> None:
    def two(seed: int) -> list[list[ImageBatch]]:
        data = KarlDataModule({str(pack): 1}, size=8, batch_size=4, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        return [list(loader), list(loader)]

    (first, second), (again, _), (other, _) = two(3), two(3), two(4)
    assert all(map(same, first, again))
    for different in (second, other):
        assert not any(map(same, first, different))
        assert not {seed for batch in first for seed in batch.seeds} & {s for batch in different for s in batch.seeds}


def test_what_is_random_about_an_image_does_not_depend_on_its_batch(pack: Path) -> None:
    """Nor on how many processes share the epoch."""

    def by_place(batch_size: int) -> dict[int, torch.Tensor]:
        data = KarlDataModule({str(pack): 1}, size=8, batch_size=batch_size)
        data.setup("fit")
        return {s: image for b in data.train_dataloader() for image, s in zip(b.images, b.seeds, strict=True)}

    one, other = by_place(4), by_place(5)
    assert len(one) == 12
    assert one.keys() == other.keys()
    assert all(torch.equal(one[seed], other[seed]) for seed in one)


def test_copies_of_an_image_in_one_epoch_differ(pack: Path) -> None:
    np.save(pack, np.random.default_rng(0).integers(0, 255, (1, 3, 16, 16), dtype=np.uint8))
    data = KarlDataModule({str(pack): 6}, size=8, batch_size=6)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(set(batch.seeds)) == 6
    assert len({tuple(image.flatten().tolist()) for image in batch.images}) > 1


def test_images_for_statistics_leave_the_order_alone(pack: Path) -> None:
    data = KarlDataModule({str(pack): 1}, size=8, batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    some = data.training_images(5)
    assert some.shape == (5, 3, 8, 8)
    assert torch.equal(some, data.training_images(5))
    assert len(data.training_images(99)) == 12
    assert len(torch.cat([batch.images for batch in loader])) == 12


@pytest.mark.parametrize("consumed", [1, 3, 4, 7])
def test_a_resumed_run_gets_the_batches_that_were_left(pack: Path, consumed: int) -> None:
    whole = KarlDataModule({str(pack): 1}, size=8, batch_size=4)
    whole.setup("fit")
    loader = whole.train_dataloader()
    batches = [batch for _ in range(3) for batch in loader]
    resumed = KarlDataModule({str(pack): 1}, size=8, batch_size=4)
    resumed.load_state_dict({"consumed": consumed})
    resumed.setup("fit")
    rest = list(resumed.train_dataloader())
    assert len(rest) == 3 - consumed % 3
    assert all(same(a, b) for a, b in zip(rest, batches[consumed:], strict=False))


def test_a_corrupt_file_is_reported_once_and_left_out(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (20, 24), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 not a picture")
    data = KarlDataModule({str(tmp_path): 1}, size=16, batch_size=4)
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"left out: .*torn\.jpg") as reports:
        batches = [*epoch(data), *epoch(data)]
    assert len(reports) == 1
    assert [batch.shape for batch in batches] == [(3, 3, 16, 16)] * 2


def test_a_batch_of_corrupt_files_only_ends_the_run() -> None:
    with pytest.raises(ValueError, match="none of the 2 images"):
        collate([None, None])


def test_development_images_are_the_middle_square(tmp_path: Path) -> None:
    image = np.zeros((24, 48, 3), dtype=np.uint8)
    image[:, 12:36] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    data = KarlDataModule({}, dev={"bands": str(tmp_path)}, test={"t": str(tmp_path)}, size=24, batch_size=2)
    data.setup("validate")
    assert data.names == ["bands"]
    for (loader,) in (data.val_dataloader(), data.test_dataloader()):
        ((images, _),) = loader
        assert images.shape == (1, 3, 24, 24)
        assert (images == 1).all()


def test_a_corrupt_development_file_does_not_end_a_run(tmp_path: Path) -> None:
    """It may be the only one of the last batch."""
    for n in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{n}.png")
    (tmp_path / "z.png").write_bytes(b"broken")
    data = KarlDataModule({}, dev={"d": str(tmp_path)}, test={"t": str(tmp_path)}, size=16, batch_size=4)
    data.setup("validate")
    for make in (data.val_dataloader, data.test_dataloader):
        with pytest.warns(UserWarning, match=r"left out: .*z\.png"):
            (loader,) = make()
        assert [len(batch.images) for batch in loader] == [4]
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(b"")
    data.setup("validate")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of the 5 images"):
        data.val_dataloader()


@pytest.mark.parametrize(("size", "area"), [(16, (0.25, 0.25)), (24, (0.5, 1.0)), (64, (0.8, 1.0))])
def test_random_views_have_the_size_and_stay_inside(size: int, area: tuple[float, float]) -> None:
    image = torch.rand(3, 32, 40)
    for seed in range(20):
        view = random_view(image, size, area, np.random.default_rng(seed))
        assert view.shape == (3, size, size)
        assert image.min() - 1e-6 <= view.min()
        assert view.max() <= image.max() + 1e-6
    if area == (0.25, 0.25):
        crops = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        assert any(torch.equal(view, c) or torch.equal(view.flip(-1), c) for c in crops), "a crop of its size is exact"


def floats(folder: Path) -> Path:
    np.save(folder / "x.npy", np.zeros((2, 3, 16, 16)))
    return folder / "x.npy"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "none", FileNotFoundError, "no array"),
        (lambda folder: folder, FileNotFoundError, "no image"),
        (floats, ValueError, "uint8"),
    ],
)
def test_sources_that_cannot_be_used_say_why(
    tmp_path: Path, make: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Images({str(make(tmp_path)): 1}, 16, None)


def test_a_batch_that_is_one_broken_file_gets_another_image(tmp_path: Path) -> None:
    """It would end the run at the end of an epoch."""
    for n in range(2):
        Image.new("RGB", (16, 16), (250, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "z.png").write_bytes(b"broken")
    data = KarlDataModule({str(tmp_path): 1}, size=16, batch_size=1)
    data.setup("fit")
    with pytest.warns(UserWarning, match="left out"):
        batches = epoch(data)
    assert [batch.shape for batch in batches] == [(1, 3, 16, 16)] * 3
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of the 1 images"):
        epoch(data)
