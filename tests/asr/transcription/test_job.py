"""The batch job with a recognizer that checks what it is given: windows, batches, order, failures, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_recognizer import FakeRecognizer
from tests.media_files import encode, voice, write
from tokenthrift.budget import BudgetError, DecodeBudget, TokenUsage
from tokenthrift.transcript import Recognizer, Transcript, TranscriptToken
from tokenthrift.transcription import Transcriber
from tokenthrift.transcription.results import FileTranscript, to_segment


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 16_000), dtype=np.float32)


def pitches(result: FileTranscript) -> set[str]:
    return set(result.text.split()) - {"pitch"}


def test_the_fake_keeps_the_protocol() -> None:
    assert isinstance(FakeRecognizer(), Recognizer)


def test_formats_and_rates(tmp_path: Path) -> None:
    sound = voice(3.0, pitch=200)
    paths = [
        write(tmp_path / "a.wav", sound),
        write(tmp_path / "b.flac", voice(3.0, 48_000, pitch=200), 48_000),
        write(tmp_path / "c.wav", voice(3.0, 8_000, pitch=200), 8_000, channels=2),
        write(tmp_path / "d.mp3", sound),
        encode(tmp_path / "e.m4a", sound, "aac", 44_100, layout="stereo"),
        encode(tmp_path / "f.mp4", sound, "aac", 48_000, video=True),
        encode(tmp_path / "g.g722", sound, "g722", 16_000),
    ]
    results = Transcriber(FakeRecognizer()).transcribe(*paths)
    assert [result.path for result in results] == paths
    for result in results:
        assert result.error is None
        assert abs(result.seconds - 3) < 0.1
        assert pitches(result) == {"200"}


def test_long_recordings(tmp_path: Path) -> None:
    """Speech, a minute of silence, speech that is longer than a window: read twice, cut, and put back in place."""
    samples = np.concatenate([voice(10, pitch=150), silence(60), voice(65, pitch=300), silence(5)])
    model = FakeRecognizer()
    (result,) = Transcriber(model).transcribe(write(tmp_path / "long.wav", samples))
    assert result.seconds == 140
    assert len(result.segments) == result.windows == 4
    assert sum(map(sum, model.batches)) < 10 + 65 + 4 * 0.7 + 2 * 3
    assert [set(segment.text.split()) - {"pitch"} for segment in result.segments] == [
        {"150"},
        {"300"},
        {"300"},
        {"300"},
    ]
    assert result.usage.used == sum(segment.usage.used for segment in result.segments)
    assert result.usage.rounds == 2 * 4
    end = 0.0
    for segment in result.segments:
        assert end <= segment.start < segment.end <= result.seconds
        assert segment.end - segment.start <= 30
        end = segment.end
        at = segment.start
        for token in segment.tokens:
            assert token.start is not None
            assert token.end is not None
            assert at <= token.start <= token.end <= segment.end
            at = token.start
    assert 69.5 < result.segments[1].start < 70


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: write(path, silence(5)), None),
        (lambda path: write(path, silence(5) + np.float32(0.1)), None),
        (lambda path: write(path, voice(0.09)), None),
        (lambda path: write(path, silence(0)), "empty"),
        (lambda path: path.write_bytes(b"") and path or path, "empty"),
        (lambda path: path.write_text("a letter, not a recording") and path, "not a recording"),
        (lambda path: path.write_bytes(write(path, voice(5)).read_bytes()[:80_000]) and path, "cut short"),
        (lambda path: write(path, np.full(16_000, np.nan, np.float32), subtype="FLOAT"), "NaN"),
        (lambda path: path, "No such file"),
        (lambda path: path.mkdir() or path, "directory"),
    ],
)
def test_recordings_that_need_no_model(make: Callable[[Path], Path], error: str | None, tmp_path: Path) -> None:
    """Silence and what is shorter than 0.1 s is empty text; what is no whole recording is a failure. No window is run,
    and the recordings before and after are done."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        path = make(tmp_path / "odd.wav")
    good = write(tmp_path / "good.wav", voice(2.0))
    model = FakeRecognizer()
    before, odd, after = Transcriber(model).transcribe(good, path, good)
    assert before.text == after.text == "pitch 140 pitch 140"
    assert odd.segments == ()
    assert sum(map(len, model.batches)) == 2
    if error is None:
        assert odd.error is None
        assert odd.usage == TokenUsage(native=0, cap=0, used=0, rounds=0)
    else:
        assert odd.error is not None
        assert error in odd.error


@settings(deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.floats(0.2, 12.0), min_size=1, max_size=12),
    batch_seconds=st.sampled_from([0.5, 4.0, 13.0, 120.0]),
)
def test_batching_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[float], batch_seconds: float
) -> None:
    """The same results in the order given, whatever the batches; batches keep their limit and are of like length."""
    folder = tmp_path_factory.mktemp("batch")
    paths = [write(folder / f"{i}.wav", voice(n, pitch=100 + 20 * i)) for i, n in enumerate(lengths)]
    model = FakeRecognizer()
    results = Transcriber(model, batch_seconds=batch_seconds).transcribe(*paths)
    assert results == [Transcriber(FakeRecognizer()).transcribe(path)[0] for path in paths]
    assert sum(map(len, model.batches)) == len(paths)
    for batch in model.batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= batch_seconds + 1e-9
        assert batch == sorted(batch, reverse=True)
    if sum(lengths) < 4 * batch_seconds:
        longest = [max(batch) for batch in model.batches]
        assert longest == sorted(longest, reverse=True)


def test_windows_are_no_longer_than_the_model_allows(tmp_path: Path) -> None:
    model = FakeRecognizer(max_seconds=5.0)
    (result,) = Transcriber(model).transcribe(write(tmp_path / "clip.wav", voice(21.0)))
    assert result.windows >= 5


def test_the_limits_of_decoding_reach_the_model(tmp_path: Path) -> None:
    model, path = FakeRecognizer(), write(tmp_path / "clip.wav", voice(2.0))
    for limits in (DecodeBudget(max_rounds=7), {"max_rounds": 7}):
        (result,) = Transcriber(model, decode=limits).transcribe(path)
        assert model.limits.pop() == DecodeBudget(max_rounds=7)
        assert result.usage.rounds == 7


def test_a_budget_of_tokens_and_one_of_decoding_are_not_mixed_up() -> None:
    with pytest.raises(BudgetError, match="give it as decode="):
        Transcriber(FakeRecognizer(), budget=DecodeBudget(max_rounds=7))
    with pytest.raises(BudgetError, match="a str where a DecodeBudget belongs"):
        Transcriber(FakeRecognizer(), decode="64")


def test_batches_that_fail_are_halved_and_a_bad_window_fails_alone(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.wav", voice(2.0, pitch=660 if i == 2 else 100 + 10 * i)) for i in range(8)]
    model = FakeRecognizer(largest_batch=3)
    results = Transcriber(model).transcribe(*paths)
    assert [index for index, result in enumerate(results) if result.error] == [2]
    assert results[2].error == "transcription failed: RuntimeError: cannot read this pitch"
    assert [pitches(result) for result in results if not result.error] == [
        {str(100 + 10 * i)} for i in range(8) if i != 2
    ]


def test_a_long_recording_fails_as_a_whole(tmp_path: Path) -> None:
    samples = np.concatenate([voice(20), silence(2), voice(20, pitch=660), silence(2), voice(20)])
    (result,) = Transcriber(FakeRecognizer()).transcribe(write(tmp_path / "clip.wav", samples))
    assert result.error is not None
    assert result.segments == ()


def test_a_budget_that_is_not_honoured_stops_the_job(tmp_path: Path) -> None:
    class Strict(FakeRecognizer):
        def transcribe(self, *arguments: object) -> list[Transcript]:
            raise BudgetError("max_rounds=1", "no max_rounds", "no max_rounds")

    with pytest.raises(BudgetError):
        Transcriber(Strict()).transcribe(write(tmp_path / "clip.wav", voice(2.0)))


def test_a_model_that_forgets_a_window_is_an_error(tmp_path: Path) -> None:
    class Forgetful(FakeRecognizer):
        def transcribe(self, *arguments: object) -> list[Transcript]:
            return []

    (result,) = Transcriber(Forgetful()).transcribe(write(tmp_path / "clip.wav", voice(2.0)))
    assert result.error is not None
    assert "0 transcripts for 1 windows" in result.error


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_batch_seconds_are_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="batch_seconds"):
        Transcriber(FakeRecognizer(), batch_seconds=seconds)


def test_progress_adds_up(tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    paths = [write(tmp_path / "a.wav", voice(65)), bad, write(tmp_path / "b.wav", silence(3))]
    steps: list[tuple[float, float]] = []
    list(Transcriber(FakeRecognizer()).stream(paths, lambda share, seconds: steps.append((share, seconds))))
    assert sum(share for share, _ in steps) == pytest.approx(3)
    assert sum(seconds for _, seconds in steps) == pytest.approx(68)
    assert all(share >= -1e-9 for share, _ in steps)


def test_results_come_as_they_are_done(tmp_path: Path) -> None:
    """A consumer that writes them never has more than a pool of them outstanding."""
    path = write(tmp_path / "clip.wav", voice(2.0))
    read = 0

    def endless() -> object:
        nonlocal read
        while True:
            read += 1
            yield path

    stream = Transcriber(FakeRecognizer(), batch_seconds=4.0).stream(endless())
    for _ in range(30):
        next(stream)
    assert read < 30 + 20


def test_memory_does_not_grow_with_the_number_of_recordings(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.flac", voice(20.0))
    program = (
        "import resource, sys; from tests.fake_recognizer import FakeRecognizer\n"
        "from tokenthrift.transcription import Transcriber\n"
        "def peak(files):\n"
        "    for result in Transcriber(FakeRecognizer(), batch_seconds=40).stream([sys.argv[1]] * files):\n"
        "        assert result.error is None\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(peak(10), peak(50))"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True, check=True
    )
    few, many = map(int, out.stdout.split())
    assert many - few < 20_000, "40 more recordings are 51 MB of samples"


@given(
    st.lists(st.tuples(st.floats(-5, 40), st.floats(-5, 40)), max_size=10),
    st.floats(0, 1e5),
    st.floats(0.1, 30),
)
def test_token_times_stay_in_their_window(times: list[tuple[float, float]], start: float, seconds: float) -> None:
    tokens = tuple(TranscriptToken(" a", 1.0, *pair) for pair in times)
    usage = TokenUsage(native=1, cap=1, used=1)
    segment = to_segment(Transcript("a  b\n", tokens, usage), start, start + seconds)
    assert segment.text == "a b"
    at = start
    for token in segment.tokens:
        assert token.start is not None
        assert token.end is not None
        assert at <= token.start <= token.end <= segment.end
        at = token.start


def test_tokens_without_times_keep_none() -> None:
    usage = TokenUsage(native=1, cap=1, used=1)
    segment = to_segment(Transcript("a", (TranscriptToken("a", 0.7),), usage), 5.0, 6.0)
    assert segment.tokens == (TranscriptToken("a", 0.7, None, None),)
