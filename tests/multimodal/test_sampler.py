"""Samplers of training: each item once, equal steps, resumed to the same items, alone and in two processes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.processes import in_this_group, together
from tokenthrift.training.processes import balanced, gathered
from tokenthrift.training.resuming import ResumableDataModule, batch_loader
from tokenthrift.training.sampler import (
    Epoch,
    ResumableBatchSampler,
    bucketed_batches,
    bucketed_epoch,
    endless_batches,
    item_rng,
    item_seed,
    ordered_batches,
    random_batches,
    random_epoch,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
LENGTHS = [3, 40, 17, 9, 9, 21, 5, 33, 12, 8, 27, 14, 2]


def items_of(epoch: Epoch) -> list[int]:
    return [index for step in range(epoch.steps) for index in epoch.batch(step)]


# Pure functions


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_random_epochs_have_each_item_once_and_no_empty_share(count: int, size: int, world: int, seed: int) -> None:
    if count < world:
        with pytest.raises(ValueError, match="processes need at least"):
            random_epoch(range(count), size, world)
        return
    epoch = random_epoch(range(count), size, world, random.Random(seed))
    assert sorted(items_of(epoch)) == list(range(count))
    shares = [len(epoch.share(step, rank)) for step in range(epoch.steps) for rank in range(world)]
    assert min(shares) >= 1
    assert max(shares) <= size + 1
    assert all(share == size for share in shares[: -2 * world])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 4), st.integers(1, 9))
def test_bucketed_epochs_have_each_item_once_within_the_limit(
    lengths: list[int], limit: int, world: int, bucket: int
) -> None:
    if len(lengths) < world:
        with pytest.raises(ValueError, match="processes need at least"):
            bucketed_epoch(lengths, limit, world)
        return
    epochs = [bucketed_epoch(lengths, limit, world, random.Random(seed), bucket) for seed in range(3)]
    assert len({epoch.steps for epoch in epochs}) == 1, "a resumed run counts by a fixed number of steps"
    shares = [epochs[0].share(step, rank) for step in range(epochs[0].steps) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(shares)
    over = [s for s in shares if len(s) > 1 and max(-(-lengths[i] // bucket) * bucket for i in s) * len(s) > limit]
    # Only where every batch holds one item and they are no multiple of the processes can one be too large.
    assert len(over) <= (world - 1 if len(lengths) < 2 * world * epochs[0].steps else 0)


@pytest.mark.parametrize(("items", "world"), [(5, 3), (7, 4), (9, 8), (3, 3), (11, 5)])
def test_batches_of_one_item_each_become_a_multiple_of_the_processes(items: int, world: int) -> None:
    """Neither halving nor joining alone reaches a multiple here; doing both in turn never ended."""
    epoch = bucketed_epoch([1] * items, 1, world)
    shares = [epoch.share(step, rank) for step in range(epoch.steps) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(items))
    assert all(shares)


def test_two_processes_have_the_global_batches_of_one() -> None:
    one = random_epoch(range(11), 4, 1, random.Random(3))
    two = random_epoch(range(11), 2, 2, random.Random(3))
    assert [one.batch(step) for step in range(3)] == [two.batch(step) for step in range(3)]
    assert [len(two.share(2, rank)) for rank in range(2)] == [2, 1]


def test_buckets_share_batches_anew_each_epoch_and_an_item_too_long_is_alone() -> None:
    epochs = [bucketed_epoch(LENGTHS, 36, 1, random.Random(seed), 10) for seed in range(2)]
    batches = [{frozenset(epoch.batch(step)) for step in range(epoch.steps)} for epoch in epochs]
    assert batches[0] != batches[1]
    for found in batches:
        assert {frozenset([1]), frozenset([7])} <= found


def test_without_random_numbers_the_order_is_kept() -> None:
    assert items_of(random_epoch([5, 3, 4], 2)) == [5, 3, 4]


def test_random_numbers_belong_to_item_and_epoch() -> None:
    numbers = {item_seed(seed, epoch, index) for seed in range(2) for epoch in range(3) for index in range(50)}
    assert len(numbers) == 300
    assert item_rng(1, 2, 3).random() == item_rng(1, 2, 3).random()


# The sampler


def test_epochs_differ_and_a_start_in_the_middle_goes_on_with_the_same_items() -> None:
    whole = random_batches(range(10), 3, seed=1)
    first, second = list(whole), list(whole)
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [i for batch in first for _, i in batch] != [i for batch in second for _, i in batch]
    for epoch, step in ((0, len(first) + 2), (1, 2)):
        resumed = random_batches(range(10), 3, seed=1)
        resumed.start(epoch, step)
        assert len(resumed) == len(first)
        assert list(resumed) == second[2:]
        assert next(iter(resumed))[0][0] == 2


def test_endless_batches_go_on_from_any_of_them() -> None:
    first = list(itertools.islice(endless_batches(LENGTHS, 45, seed=3), 40))
    sampler = bucketed_batches(LENGTHS, 45, seed=3)
    epoch = [[index for _, index in keys] for keys in sampler]
    assert first[: len(epoch)] == epoch
    assert sorted(itertools.chain(*first[: len(epoch)])) == list(range(len(LENGTHS)))
    assert first[len(epoch) : 2 * len(epoch)] != epoch
    for begun in (1, len(epoch), len(epoch) + 1, 30):
        assert (
            list(itertools.islice(endless_batches(LENGTHS, 45, seed=3, first=begun), 10)) == first[begun : begun + 10]
        )


def test_the_number_of_the_trainer_does_not_count() -> None:
    sampler = random_batches(range(6), 2)
    sampler.set_epoch(7)
    assert next(iter(sampler))[0][0] == 0


def test_evaluation_has_the_same_batches_every_time() -> None:
    sampler = ordered_batches(5, 2)
    assert list(sampler) == list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    with pytest.raises(ValueError, match="no items"):
        list(ordered_batches(0, 2))


class Numbers:
    """Items whose values say what was asked for."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return torch.tensor(key)


def test_a_loader_with_workers_starts_where_it_should() -> None:
    """A loader with workers makes two iterators of its sampler before the first batch."""
    sampler = random_batches(range(13), 4)
    sampler.start(1, 2)
    loader = batch_loader(Numbers(), sampler, torch.stack, workers=1)
    batches = list(loader)
    assert len(loader) == 4
    assert [int(batch[0, 0]) for batch in batches] == [1, 1]
    assert [int(batch[0, 0]) for batch in loader] == [2] * 4


# Two processes


def keys_and_gradient() -> dict[str, Any]:
    """The keys of two epochs, and the gradient of a mean over a global batch, by DistributedDataParallel."""
    sampler = bucketed_batches(LENGTHS, 36, seed=2)
    keys = [list(sampler), list(sampler)]
    evaluated = list(ordered_batches(3, 1))
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    parallel = nn.parallel.DistributedDataParallel(net)
    share = torch.tensor([[float(index)] for _, index in next(iter(random_batches(range(3), 2)))])
    loss = balanced(parallel(share).square().mean(), len(share))
    loss.backward()
    assert net.weight.grad is not None
    return {
        "keys": keys,
        "evaluated": evaluated,
        "gradient": net.weight.grad,
        "loss": loss.detach(),
        "rows": gathered([len(share)]),
    }


def test_two_processes_share_the_items_and_have_the_gradient_of_one(tmp_path: Path) -> None:
    first, second = together(tmp_path, keys_and_gradient)
    for epoch in range(2):
        assert len(first["keys"][epoch]) == len(second["keys"][epoch])
        both = [key for found in (first, second) for batch in found["keys"][epoch] for key in batch]
        assert sorted(both) == [(epoch, index) for index in range(len(LENGTHS))]
    assert sorted(key for found in (first, second) for batch in found["evaluated"] for key in batch) == [
        (0, 0),
        (0, 1),
        (0, 2),
    ]
    assert first["rows"] == second["rows"] == [2, 1], "unequal shares"
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    loss = net(torch.arange(3.0)[:, None]).square().mean()
    loss.backward()
    torch.testing.assert_close(first["gradient"], net.weight.grad)
    torch.testing.assert_close(first["gradient"], second["gradient"])
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach())


def test_a_process_without_anything_to_learn_does_no_harm() -> None:
    loss = balanced(torch.tensor(2.0), 0)
    assert loss == 2.0


# Under Lightning


class NumbersData(ResumableDataModule):
    """The numbers above, in batches of like length."""

    def train_dataloader(self) -> Any:
        return self.training_loader(Numbers(), bucketed_batches(LENGTHS, 36), torch.stack)

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Numbers(), 4, torch.stack)


class Seen(L.LightningModule):
    """Notes which items each step had."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.keys: list[list[list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.keys.append(batch.tolist())
        loss: Tensor = self.net(batch[:, 1:].float()).square().mean()
        return balanced(loss, len(batch))

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated += batch[:, 1].tolist()
        self.log("seen", float(len(batch)), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def run(
    folder: Path | None, steps: int, epochs: int = -1, resume: Path | None = None, **options: Any
) -> tuple[Seen, L.Trainer]:
    torch.manual_seed(0)
    module = Seen()
    callbacks: list[Any] = []
    if folder is not None:
        callbacks = [
            ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
            ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, auto_insert_metric_name=False),
        ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=NumbersData(), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize("limit", [1.0, 3])
def test_a_resumed_run_sees_what_the_whole_one_saw(tmp_path: Path, limit: float) -> None:
    whole, _ = run(tmp_path, 17, limit_train_batches=limit)
    length = 3 if limit == 3 else len(bucketed_batches(LENGTHS, 36))
    assert whole.keys[length][0][0] == 1, "the second epoch"
    files = sorted(tmp_path.glob("*.ckpt"))
    assert any(file.name.startswith("epoch") for file in files)
    for done in (1, length - 1, length, length + 1, 2 * length):
        resumed, _ = run(None, 17, resume=tmp_path / f"step-{done}.ckpt", limit_train_batches=limit)
        assert resumed.keys == whole.keys[done:], f"from step {done}"
    resumed, _ = run(None, 17, resume=tmp_path / "epoch-1.ckpt", limit_train_batches=limit)
    assert resumed.keys == whole.keys[2 * length :]


def test_the_count_of_an_older_checkpoint_is_read() -> None:
    data = NumbersData()
    data.load_state_dict({"consumed": 2 * len(bucketed_batches(LENGTHS, 36)) + 1})
    loader = data.train_dataloader()
    assert int(next(iter(loader))[0, 0]) == 2
    assert data.state_dict() == {"epoch": 0, "step": 2 * len(bucketed_batches(LENGTHS, 36)) + 1}


def two_runs(folder: Path) -> dict[str, Any]:
    """A whole run in two processes, and one that is resumed in the middle of the second epoch."""
    length = len(bucketed_batches(LENGTHS, 36))
    whole, _ = run(folder, 2 * length, **in_this_group())
    resumed, _ = run(None, 2 * length, resume=folder / f"step-{length + 1}.ckpt", **in_this_group())
    return {"keys": whole.keys, "resumed": resumed.keys, "validated": whole.validated, "steps": length}


def test_lightning_leaves_the_batches_of_two_processes_alone(tmp_path: Path) -> None:
    """With its default `use_distributed_sampler=True`."""
    folder = tmp_path / "checkpoints"
    found = together(tmp_path, two_runs, folder)
    steps = found[0]["steps"]
    assert steps < len(bucketed_batches(LENGTHS, 36))
    for epoch in range(2):
        keys = [
            tuple(key) for one in found for batch in one["keys"][epoch * steps : (epoch + 1) * steps] for key in batch
        ]
        assert sorted(keys) == [(epoch, index) for index in range(len(LENGTHS))]
    for one in found:
        assert one["resumed"] == one["keys"][steps + 1 :]
    assert sorted(i for one in found for i in one["validated"]) == sorted(2 * list(range(len(LENGTHS))))


def test_what_makes_batches_is_a_sampler_that_lightning_does_not_replace() -> None:
    assert isinstance(random_batches(range(3), 1), torch.utils.data.DistributedSampler)
    assert isinstance(random_batches(range(3), 1), ResumableBatchSampler)
