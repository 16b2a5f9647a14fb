"""Batches for training: seeded by epoch, dealt out to processes, resumed in the middle of an epoch to the same items.

An epoch is a fixed list of *steps*. Each step is one global batch, which the processes share: every item comes once in
an epoch, every process has equally many steps, and no process is ever without items. The order depends on the seed and
the epoch alone, so that a resumed run goes on with the items that would have come.

A sampler yields lists of keys `(epoch, index)`. A data set that draws something for an item (a crop, a mask) draws it
from `item_rng(seed, epoch, index)`: it then depends neither on the other items of the batch, nor on the number of
processes, nor on a resume.

Source: the buckets of Llama-MTSK (arXiv 2503.06362) for batches of like length. What differs from Lightning: it wraps
samplers in its own `DistributedSampler`, which knows nothing of batches of unequal size or of resuming. It leaves one
alone that is a `DistributedSampler` already, so `ResumableBatchSampler` is one, and is used as `sampler` of a
DataLoader without automatic batching (see `tokenthrift.training.resuming`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeAlias, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from tokenthrift.training.processes import rank_and_world

__all__ = [
    "Epoch",
    "Key",
    "ResumableBatchSampler",
    "bucketed_batches",
    "bucketed_epoch",
    "endless_batches",
    "item_rng",
    "item_seed",
    "ordered_batches",
    "random_batches",
    "random_epoch",
]

Key: TypeAlias = tuple[int, int]
"""Epoch and index of an item."""


def item_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random numbers of one item in one epoch."""
    return random.Random(f"{seed}-{epoch}-{index}")


def item_seed(seed: int, epoch: int, index: int) -> int:
    """A seed of 63 bits from the same source, for generators of numpy or torch."""
    return item_rng(seed, epoch, index).getrandbits(63)


@dataclass(frozen=True, slots=True, eq=False)
class Epoch:
    """The batches of one epoch, for all processes.

    Attributes:
        order: `(n,)` indices of the items, step after step, and within a step process after process.
        ends: `(steps * world,)` where the share of each process in each step ends in `order`.
        world: number of processes.
    """

    order: Any
    ends: Any
    world: int

    @property
    def steps(self) -> int:
        """How many batches each process has."""
        return len(self.ends) // self.world

    def share(self, step: int, rank: int) -> list[int]:
        """The items of one process in one step."""
        place = step * self.world + rank
        start = int(self.ends[place - 1]) if place else 0
        return [int(index) for index in self.order[start : self.ends[place]]]

    def batch(self, step: int) -> list[int]:
        """The items of all processes in one step, the global batch."""
        return [index for rank in range(self.world) for index in self.share(step, rank)]


def random_epoch(indices: Sequence[int], batch_size: int, world: int = 1, rng: random.Random | None = None) -> Epoch:
    """Steps of `batch_size * world` items in random order; the last one has what is left over, evenly shared.

    With the same random numbers, `world` processes with batches of n have the global batches of one process with
    batches of `n * world`. What is left over and too little for every process joins the step before.

    Args:
        indices: of the items, each once.
        batch_size: most items of a process, one more in the last step at most.
        world: number of processes.
        rng: of the order; None keeps it as it is.

    Raises:
        ValueError: there are fewer items than processes.
    """
    _check_enough(len(indices), world)
    order = np.asarray(indices, dtype=np.int64)
    if rng is not None:
        order = np.random.default_rng(rng.getrandbits(63)).permutation(order)
    size = batch_size * world
    starts = np.arange(0, len(order), size)
    if len(starts) > 1 and len(order) - starts[-1] < world:
        starts = starts[:-1]
    totals = np.diff(starts, append=len(order))
    shares = totals[:, None] // world + (np.arange(world) < (totals % world)[:, None])
    return Epoch(order, np.cumsum(shares.flatten()), world)


def bucketed_epoch(
    lengths: Sequence[int],
    max_total: int,
    world: int = 1,
    rng: random.Random | None = None,
    bucket: int = 1,
) -> Epoch:
    """Batches of items of like length, as many in each as fit with padding; the steps come in random order.

    The processes get neighbors in length in each step, so that they need about equally long for it.

    Args:
        lengths: of the items.
        max_total: most of a process: the longest item, rounded up to whole buckets, times the number of items. An item
            that is longer has a batch to itself.
        world: number of processes.
        rng: of the order of the steps, and of who shares a batch within a bucket; None draws nothing.
        bucket: lengths are rounded up to multiples of it. Items of one bucket are mixed anew each epoch, and how many
            steps there are stays the same.

    Raises:
        ValueError: there are fewer items than processes.
    """
    _check_enough(len(lengths), world)
    rounded = [-(-length // bucket) * bucket for length in lengths]
    ties = [0.0 if rng is None else rng.random() for _ in lengths]
    batches: list[list[int]] = []
    longest = 0
    # Long items first, so that what has to be split for the last step is short.
    for index in sorted(range(len(lengths)), key=lambda i: (-rounded[i], ties[i], i)):
        if not batches or longest * (len(batches[-1]) + 1) > max_total:
            batches.append([])
            longest = rounded[index]
        batches[-1].append(index)
    _make_multiple(batches, world)
    steps = [batches[i : i + world] for i in range(0, len(batches), world)]
    if rng is not None:
        rng.shuffle(steps)
    parts = [part for step in steps for part in step]
    return Epoch(np.concatenate(parts), np.cumsum([len(part) for part in parts]), world)


def _make_multiple(batches: list[list[int]], world: int) -> None:
    """Makes the number of batches a multiple of `world`: halves the largest, or joins the last where too few can be."""
    missing = -len(batches) % world
    if sum(len(batch) - 1 for batch in batches) >= missing:
        for _ in range(missing):
            i = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[i]) // 2
            batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
    else:
        for _ in range(len(batches) % world):
            last = batches.pop()
            batches[-1].extend(last)


def _check_enough(items: int, world: int) -> None:
    if not items:
        raise ValueError("there are no items to make batches of")
    if items < world:
        raise ValueError(f"{world} processes need at least {world} items, and there are {items}")


class ResumableBatchSampler(DistributedSampler[list[Key]]):
    """The batches of this process, as lists of keys, epoch after epoch.

    It counts its epochs itself: each iteration is the next one. Rank and number of processes are asked for when they
    are needed, not when the sampler is made. Make one with `random_batches`, `bucketed_batches` or `ordered_batches`.

    Args:
        epoch_of: what makes the `Epoch` of a number and a number of processes; it has to have the same number of steps
            for every number.
        fixed: every epoch is epoch 0, for evaluation.

    Attributes:
        next_epoch: what the next iteration yields.
        next_step: where in that epoch it starts; 0 but for a resumed one.
        current_epoch: what was yielded last.
    """

    def __init__(self, epoch_of: Callable[[int, int], Epoch], *, fixed: bool = False) -> None:
        super().__init__(cast(Dataset[Any], range(1)), num_replicas=1, rank=0, shuffle=False)
        self.epoch_of, self.fixed = epoch_of, fixed
        self.next_epoch = self.next_step = self.current_epoch = 0
        self._made: tuple[int, int, Epoch] | None = None
        self._steps: dict[int, int] = {}

    def start(self, epoch: int, step: int) -> None:
        """Makes the next iteration begin after so many steps of an epoch; more than it has count on into the next."""
        further, self.next_step = divmod(step, len(self))
        self.next_epoch = self.current_epoch = epoch + further

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Lightning's number is another one after a resume at the end of an epoch."""

    def __len__(self) -> int:
        """Steps of a whole epoch, for each process."""
        _, world = rank_and_world()
        if world not in self._steps:
            self._steps[world] = self.epoch_of(0, world).steps
        return self._steps[world]

    def __iter__(self) -> Iterator[list[Key]]:
        # A generator, so nothing is counted before the first batch is asked for: a loader with workers makes two.
        number, start = self.next_epoch, self.next_step
        self.current_epoch = number
        self.next_epoch, self.next_step = (number if self.fixed else number + 1), 0
        rank, _ = rank_and_world()
        epoch = self._epoch(number)
        for step in range(start, epoch.steps):
            yield [(number, index) for index in epoch.share(step, rank)]

    def _epoch(self, number: int) -> Epoch:
        _, world = rank_and_world()
        if self._made is None or self._made[:2] != (number, world):
            self._made = (number, world, self.epoch_of(number, world))
        return self._made[2]


def random_batches(indices: Sequence[int], batch_size: int, *, seed: int = 0) -> ResumableBatchSampler:
    """Batches in random order, see `random_epoch`.

    Args:
        indices: of the items of an epoch, each once; `range(n)` for all of n.
        batch_size: items of each process.
        seed: of the order.
    """
    return ResumableBatchSampler(partial(_random, indices, batch_size, seed))


def bucketed_batches(
    lengths: Sequence[int], max_total: int, *, seed: int = 0, bucket: int = 1
) -> ResumableBatchSampler:
    """Batches of like length, see `bucketed_epoch`; the index of an item is its place in `lengths`."""
    return ResumableBatchSampler(partial(_bucketed, lengths, max_total, seed, bucket))


def endless_batches(
    lengths: Sequence[int], max_total: int, *, seed: int = 0, bucket: int = 1, first: int = 0
) -> Iterator[list[int]]:
    """The batches of `bucketed_batches`, epoch after epoch, as indices alone; for a loop that counts steps.

    Args:
        lengths: of the items.
        max_total: most of a batch, with padding.
        seed: of the order.
        bucket: lengths are rounded up to multiples of it.
        first: batches that have been.

    Raises:
        ValueError: there are no items; where the first batch is asked for.
    """
    sampler = bucketed_batches(lengths, max_total, seed=seed, bucket=bucket)
    sampler.start(0, first)
    for keys in chain.from_iterable(repeat(sampler)):
        yield [index for _, index in keys]


def ordered_batches(count: int, batch_size: int) -> ResumableBatchSampler:
    """All of `count` items in order, for validation and tests: the same every time, with 0 as epoch.

    With more processes than items some come more than once, since no process may be without.
    """
    return ResumableBatchSampler(partial(_ordered, count, batch_size), fixed=True)


def _random(indices: Sequence[int], batch_size: int, seed: int, epoch: int, world: int) -> Epoch:
    return random_epoch(indices, batch_size, world, random.Random(f"{seed}-{epoch}"))


def _bucketed(lengths: Sequence[int], max_total: int, seed: int, bucket: int, epoch: int, world: int) -> Epoch:
    return bucketed_epoch(lengths, max_total, world, random.Random(f"{seed}-{epoch}"), bucket)


def _ordered(count: int, batch_size: int, epoch: int, world: int) -> Epoch:
    return random_epoch([i % count for i in range(max(count, world))] if count else [], batch_size, world)
