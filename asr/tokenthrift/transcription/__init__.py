"""The batch job: recordings of any length and format to text, subtitles and JSON, through any recognizer.

`job` is the work itself (`Transcriber`), `windows` cuts where it is quiet, `lips` pairs sound with lips in the picture,
`results` and `writers` hold and write what came out, `subtitles` makes cues, `references` scores against what was said,
`models` knows which class reads which model folder, `report` prints, and `cli` is the command.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.transcription.job import Transcriber
    from tokenthrift.transcription.models import load_recognizer
    from tokenthrift.transcription.results import Segment, Transcription

__all__ = ["Segment", "Transcriber", "Transcription", "load_recognizer"]

_HOMES = {"Segment": "results", "Transcriber": "job", "Transcription": "results", "load_recognizer": "models"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used: the command checks its arguments before it spends seconds on torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
