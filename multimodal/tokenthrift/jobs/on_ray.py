"""Work on a Ray cluster: Ray Data maps items over workers with a model each; results come back to the one driver.

Workers send back what is small; files, journal and lock stay with the process that started the job, so that the tree is
that of the local engine. A worker that dies takes nothing with it: Ray starts another and gives it the items again. A
result may then come twice, which is the driver's to see. Items are read by the workers, from a file system that all of
them see. A worker has a GPU, or a share of one, where the cluster has any, else a processor.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenthrift import extras

__all__ = ["ClusterError", "map_on_ray"]


class ClusterError(ValueError):
    """The cluster cannot do the work: a model that cannot be used, say, or workers that die again and again."""


class _Actor:
    """One worker of Ray Data: makes its work once, then maps batches of pickled items to pickled results."""

    def __init__(
        self, make: Callable[..., Callable[[list[Any]], Iterable[Any]]], arguments: tuple[Any, ...], folder: str
    ) -> None:
        # Workers of a cluster that was there before begin elsewhere, and names of files and models may be relative.
        if os.path.isdir(folder):
            os.chdir(folder)
        self.work = make(*arguments)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        items = [pickle.loads(data) for data in batch["item"]]  # written by this job's own driver
        for result in self.work(items):
            yield {"result": [pickle.dumps(result)]}


def map_on_ray(
    make: Callable[..., Callable[[list[Any]], Iterable[Any]]],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    *,
    workers: int,
    address: str | None = None,
    at_once: int = 1,
) -> Iterator[Any]:
    """Results of all items, each as soon as it is there, in no certain order.

    Args:
        make: called once on each worker; gives what is called with lists of items and gives their results one by one.
        arguments: of `make`.
        items: plain data.
        workers: how many at once.
        address: of a cluster; one is started here if None.
        at_once: items in a list.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: the cluster cannot do the work.
    """
    ray, data = extras.require("ray"), extras.require("ray.data")
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {} if address else {"num_cpus": workers + 1}
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, **local)
        except Exception as error:  # Of many types: a cluster that is not there, a node that does not start in time.
            raise ClusterError(f"Ray: {_last_line(error)}") from error
    try:
        data.DataContext.get_current().enable_progress_bars = False
        gpus = float(ray.cluster_resources().get("GPU", 0))
        share = {"num_gpus": min(1.0, gpus / workers)} if gpus else {"num_cpus": 1}
        blocks = max(1, -(-len(items) // at_once))
        rows = [{"item": pickle.dumps(item)} for item in items]
        mapped = data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(make, arguments, os.getcwd()),
            batch_size=at_once,
            compute=data.ActorPoolStrategy(size=min(workers, blocks)),
            **share,
        )
        for row in mapped.iter_rows():
            yield pickle.loads(row["result"])  # written by this job's own workers
    except ray.exceptions.RayError as error:
        # Before the last line of its text stand the calls of the worker.
        raise ClusterError(f"Ray: {_last_line(error)}") from error
    finally:
        if started:
            ray.shutdown()


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
