"""The job on a Ray cluster: Ray Data maps recordings over workers with a model each; the driver writes.

Workers send back transcripts, which are small; files, journal and lock stay with the one process that started the job,
so that the tree is that of the local engine, and a worker that dies takes nothing with it: Ray gives its recordings to
another. Recordings are read by the workers, from a file system that all of them see. A worker has a GPU where the
cluster has any, or a processor.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenthrift import extras
from tokenthrift.transcription.engine import JobSpec
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.results import FileTranscript

__all__ = ["RayEngine"]

_FILES_AT_ONCE = 8


class _Worker:
    """One model on one worker; called with a batch of recordings."""

    def __init__(self, spec: JobSpec) -> None:
        self.transcriber = spec.transcriber()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        recordings = [pickle.loads(data) for data in batch["recording"]]  # written by this job's own driver
        found = dict(self.transcriber.finished(recordings))
        return {
            "index": [int(index) for index in batch["index"]],
            "result": [pickle.dumps(found[i]) for i in range(len(recordings))],
        }


class RayEngine:
    """Runs a job on Ray.

    Args:
        spec: the job.
        workers: models at once.
        address: of a cluster; one is started here if None.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, spec: JobSpec, workers: int = 2, address: str | None = None) -> None:
        self.spec, self.workers, self.address = spec, workers, address
        self._ray = extras.require("ray")

    def finished(
        self,
        recordings: Sequence[Recording],
        report: Callable[[float, float], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, FileTranscript]]:
        """Results as they are done, with the places of their recordings."""
        data = extras.require("ray.data")
        started = not self._ray.is_initialized()
        if started:
            local: dict[str, Any] = {} if self.address else {"num_cpus": self.workers + 1}
            self._ray.init(address=self.address, log_to_driver=False, include_dashboard=False, **local)
        try:
            data.DataContext.get_current().enable_progress_bars = False
            gpus = float(self._ray.cluster_resources().get("GPU", 0))
            share = {"num_gpus": min(1.0, gpus / self.workers)} if gpus else {"num_cpus": 1}
            items = [{"index": i, "recording": pickle.dumps(item)} for i, item in enumerate(recordings)]
            blocks = max(1, -(-len(items) // _FILES_AT_ONCE))
            mapped = data.from_items(items, override_num_blocks=blocks).map_batches(
                _Worker,
                fn_constructor_args=(self.spec,),
                batch_size=_FILES_AT_ONCE,
                compute=data.ActorPoolStrategy(size=min(self.workers, blocks)),
                **share,
            )
            for row in mapped.iter_rows():
                result: FileTranscript = pickle.loads(row["result"])  # written by this job's own workers
                report(1.0, result.seconds)
                yield int(row["index"]), result
                if stop():
                    return
        finally:
            if started:
                self._ray.shutdown()
