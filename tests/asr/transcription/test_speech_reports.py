"""What was reported against other programs about finding speech in recordings, tried against this one on real voices.

| report | there |
| --- | --- |
| m-bain/whisperX 828, 931; SYSTRAN/faster-whisper 1179, 1214, 1270 | phrases at the start or between others are lost |
| SYSTRAN/faster-whisper 125 | the first word after a long silence begins seconds early |
| SYSTRAN/faster-whisper 230, 1119 | what was said before a pause ends where the next begins |
| SYSTRAN/faster-whisper 919 | times behind the end of a recording shorter than a window |
| snakers4/silero-vad 665 | a soft voice is not found |
| NVIDIA/xr-ai 157 | the network remembers the recording before; a short command is not found |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from torch import Tensor

from tests.asr.one_token import RATE, USAGE, OneToken
from tests.media_files import Samples
from tokenthrift.budget import BudgetLike, DecodeLike
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.transcription import sound
from tokenthrift.transcription.job import Transcriber
from tokenthrift.transcription.results import FileTranscript
from tokenthrift.transcription.vad import load_vad

pytest.importorskip("silero_vad")

SAMPLES = Path(__file__).parents[3] / "samples" / "speech"


class Syllables(OneToken):
    """Writes a word for every stretch of 50 ms or more that is loud, with its times: no word is lost or made up."""

    def transcribe(
        self, audio: Sequence[Tensor], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        return [self._read(samples.numpy()) for samples in audio]

    def _read(self, samples: Samples) -> Transcript:
        spans = loud(samples)
        tokens = tuple(TranscriptToken(f" w{i}", 1.0, start, end) for i, (start, end) in enumerate(spans))
        return Transcript(" ".join(token.text.strip() for token in tokens), tokens, USAGE)


def loud(samples: Samples) -> list[tuple[float, float]]:
    """Seconds from which to which there is a voice."""
    levels = np.square(samples[: len(samples) // 800 * 800].reshape(-1, 800)).mean(1)
    edges = np.flatnonzero(np.diff(np.r_[False, levels > 0.02 * max(levels.max(initial=0), 1e-9), False].astype(int)))
    return [(start * 0.05, stop * 0.05) for start, stop in edges.reshape(-1, 2)]


@pytest.fixture(autouse=True)
def silero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have replaced it by energy."""
    monkeypatch.setattr(sound, "load_vad", load_vad)


def clip(name: str, gain: float = 1.0) -> Samples:
    samples, rate = soundfile.read(SAMPLES / f"{name}.flac", dtype="float32")
    assert rate == RATE
    return np.asarray(gain * samples, dtype=np.float32)


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE), np.float32)


def transcribed(samples: Samples) -> FileTranscript:
    return Transcriber(Syllables()).transcribe((samples, RATE))[0]


NAMES = ("asterisk-agent-pass", "asterisk-conf-otherinparty", "asterisk-dir-multi9", "asterisk-privacy-unident")


@pytest.mark.parametrize("gap", [0.05, 0.9, 5.0])
def test_no_phrase_is_lost_at_the_start_or_between_others(gap: float) -> None:
    clips = [clip(name) for name in NAMES]
    result = transcribed(np.concatenate([part for each in clips for part in (each, silence(gap))]))
    at = 0.0
    for each in clips:
        for start, end in loud(each):
            middle = at + (start + end) / 2
            assert any(word.start - 0.1 <= middle <= word.end + 0.1 for word in result.words), (gap, middle)
        at += len(each) / RATE + gap


def test_words_around_a_long_silence_are_where_they_are_spoken() -> None:
    first, second = clip(NAMES[0]), clip(NAMES[1])
    result = transcribed(np.concatenate([silence(20), first, silence(75), second]))
    one, two = result.segments
    spoken = [20 + loud(first)[0][0], 20 + loud(first)[-1][1], 95 + len(first) / RATE + loud(second)[0][0]]
    assert abs(one.words[0].start - spoken[0]) < 0.3
    assert one.end < spoken[1] + 1.0, "a segment ends with its speech and not where the next one begins"
    assert abs(two.words[0].start - spoken[2]) < 0.3
    assert two.start > spoken[2] - 1.0


def test_no_time_is_behind_the_end_of_a_short_recording() -> None:
    samples = clip(NAMES[2])
    result = transcribed(samples)
    assert result.segments[-1].end <= len(samples) / RATE
    assert all(0 <= word.start <= word.end <= len(samples) / RATE for word in result.words)


@pytest.mark.parametrize("gain", [1e-2, 2e-3])
def test_a_soft_voice_has_the_windows_of_a_loud_one(gain: float) -> None:
    names = ("asterisk-vm-instructions", "asterisk-tt-somethingwrong")
    loudly, softly = ([transcribed(clip(name, level)) for name in names] for level in (1.0, gain))
    for one, other in zip(loudly, softly, strict=True):
        assert [s.start for s in one.segments] == pytest.approx([s.start for s in other.segments], abs=0.1)
        assert [s.end for s in one.segments] == pytest.approx([s.end for s in other.segments], abs=0.1)


def test_nothing_is_remembered_of_the_recording_before_and_a_short_word_is_found() -> None:
    word = clip("asterisk-vm-tempremoved")
    start, end = loud(word)[0]
    short = np.concatenate([silence(2), word[round(start * RATE) : round(min(end, start + 0.35) * RATE)], silence(2)])
    noise = np.random.default_rng(0).normal(0, 0.05, 8 * RATE).astype(np.float32)
    alone = transcribed(short)
    after = Transcriber(Syllables()).transcribe((noise, RATE), (clip(NAMES[3]), RATE), (short, RATE))[-1]
    assert alone.status == "completed"
    assert (after.text, after.words, after.segments) == (alone.text, alone.words, alone.segments)
