"""Reference transcripts beside the recordings, and the error rates of a run against them.

One convention: a manifest of JSON lines as NeMo's, `{"audio_filepath": "clip.flac", "text": "what was said"}`, paths
relative to the manifest's own folder. Further keys are allowed and ignored.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from tokenthrift.evaluation.wer import ErrorCount, character_errors, word_errors
from tokenthrift.transcription.recordings import ManifestError
from tokenthrift.transcription.results import FileTranscript

__all__ = ["ManifestError", "References", "read_references"]


@dataclass(slots=True)
class References:
    """What was said in each recording, and the errors counted so far.

    Attributes:
        texts: Absolute path of a recording to what was said in it.
        words: Word errors of all recordings scored.
        characters: Their character errors.
        scored: How many recordings had a reference.
    """

    texts: dict[str, str]
    words: ErrorCount = field(default_factory=ErrorCount)
    characters: ErrorCount = field(default_factory=ErrorCount)
    scored: int = 0

    def said(self, result: FileTranscript) -> str | None:
        """What was said in a recording, by its own manifest or by these references."""
        return result.reference if result.reference is not None else self.texts.get(os.path.abspath(result.path))

    def score(self, result: FileTranscript) -> ErrorCount | None:
        """Word errors of one transcript, added to the totals; None where there is no reference or no transcript."""
        said = self.said(result)
        if said is None or result.error is not None:
            return None
        words = word_errors([said], [result.text])
        self.words += words
        self.characters += character_errors([said], [result.text])
        self.scored += 1
        return words


def read_references(*manifests: Path) -> References:
    """Reads manifests; where two speak of the same recording, the later one counts.

    Raises:
        ManifestError: One cannot be read, or a line is not an object with the strings `audio_filepath` and `text`.
        MissingExtraError: The packages that count errors are not installed.
    """
    # Importing them takes seconds, which would otherwise count as time spent on the first recording.
    word_errors([""], [""])
    texts = {}
    for manifest in manifests:
        try:
            lines = manifest.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ManifestError(f"{manifest}: cannot be read: {reason}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                name, text = _entry(line, f"{manifest}, line {number}")
                texts[os.path.abspath(manifest.parent / name)] = text
    return References(texts)


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name, text = entry["audio_filepath"], entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = text = None
    if not isinstance(name, str) or not isinstance(text, str):
        raise ManifestError(f'{where}: expected {{"audio_filepath": "...", "text": "..."}}')
    return name, text
