"""Two processes that train together on a CPU, forked from the test: a new interpreter would import for seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed


def _member(rank: int, world: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
        # Who leaves before the other has connected breaks the connection, where `work` says nothing to the other.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def together(folder: Path, work: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """Calls a function in several processes that form one gloo group.

    Args:
        folder: an empty one, for their meeting and their results.
        work: called with `arguments`; its result is plain data or tensors.

    Returns:
        What each process returned, by rank.
    """
    context = torch.multiprocessing.get_context("fork")
    members = [context.Process(target=_member, args=(i, world, folder, work, arguments)) for i in range(world)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


class _Group(LightningEnvironment):
    """Ranks as the group knows them, each process a node of one device."""

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    def world_size(self) -> int:
        """Processes of the group."""
        return distributed.get_world_size()

    def global_rank(self) -> int:
        """Of this process."""
        return distributed.get_rank()

    def local_rank(self) -> int:
        """One device a node."""
        return 0

    def node_rank(self) -> int:
        """As many nodes as processes."""
        return distributed.get_rank()

    def set_world_size(self, size: int) -> None:
        """The group knows."""

    def set_global_rank(self, rank: int) -> None:
        """The group knows."""


def in_this_group() -> dict[str, Any]:
    """Options of a Trainer that trains in the group of `together`, data-parallel, with Lightning's own defaults."""
    strategy = DDPStrategy(cluster_environment=_Group(), process_group_backend="gloo")
    return {"devices": 1, "num_nodes": distributed.get_world_size(), "strategy": strategy}
