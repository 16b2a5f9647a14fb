"""The job on a Ray cluster, see `tokenthrift.jobs.on_ray`: workers transcribe, the driver writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tokenthrift.jobs.on_ray import map_on_ray
from tokenthrift.transcription.engine import JobSpec
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.results import FileTranscript

__all__ = ["RayEngine"]

_FILES_AT_ONCE: Final = 8


class _Worker:
    """One model on one worker."""

    def __init__(self, spec: JobSpec) -> None:
        self.transcriber = spec.transcriber()

    def __call__(self, items: list[tuple[int, Recording]]) -> Iterator[tuple[int, FileTranscript]]:
        for index, result in self.transcriber.finished([recording for _, recording in items]):
            yield items[index][0], result


class RayEngine:
    """Runs a job on Ray.

    Args:
        spec: the job.
        workers: models at once.
        address: of a cluster; one is started here if None.
    """

    def __init__(self, spec: JobSpec, workers: int = 2, address: str | None = None) -> None:
        self.spec, self.workers, self.address = spec, workers, address

    def finished(
        self,
        recordings: Sequence[Recording],
        report: Callable[[float, float], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, FileTranscript]]:
        """Results as they are done, with the indices of their recordings.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        given: set[int] = set()
        items = list(enumerate(recordings))
        results = map_on_ray(
            _Worker, (self.spec,), items, workers=self.workers, address=self.address, at_once=_FILES_AT_ONCE
        )
        for index, result in results:
            if index in given:
                continue
            given.add(index)
            report(1.0, result.seconds)
            yield index, result
            if stop():
                return
