"""Windows: laws for any recording, and what counts as silence for signals that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.media_files import Samples, voice
from tokenthrift.transcription.windows import Window, cut, frame_levels, plan_windows

RATE = 16_000
FRAME = 320


def plan(samples: Samples) -> list[Window]:
    levels, total = frame_levels([samples], RATE)
    return plan_windows(levels, total, RATE)


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def hiss(seconds: float, loudness: float) -> Samples:
    noise = np.random.default_rng(3).normal(size=round(seconds * RATE)) * loudness
    return np.asarray(noise, dtype=np.float32)


def loud_frames(samples: Samples) -> list[int]:
    return [i for i in range(0, len(samples), FRAME) if np.abs(samples[i : i + FRAME]).max() > 0.01]


def inside(windows: list[Window], sample: int) -> bool:
    return any(window.start <= sample < window.stop for window in windows)


levels_of_any_kind = st.lists(
    st.tuples(st.integers(1, 400), st.sampled_from([-120.0, -80.0, -60.0, -50.0, -20.0])), min_size=1, max_size=25
).map(lambda runs: np.concatenate([np.full(count, level) for count, level in runs]))


@settings(deadline=None, max_examples=80)
@given(
    levels=levels_of_any_kind,
    jitter=st.integers(0, 2**32 - 1),
    short=st.integers(0, FRAME - 1),
    longest=st.sampled_from([0.5, 3.0, 30.0]),
)
def test_laws(levels: np.ndarray, jitter: int, short: int, longest: float) -> None:
    """Windows are ordered, inside the file and short enough, overlap little, and hold every frame that stands out."""
    levels = levels + np.random.default_rng(jitter).normal(size=len(levels))
    total = len(levels) * FRAME - short
    windows = plan_windows(levels, total, RATE, longest)
    edges = [edge for window in windows for edge in (window.start, window.stop)]
    assert [window.start for window in windows] == sorted({window.start for window in windows})
    assert [window.stop for window in windows] == sorted({window.stop for window in windows})
    assert all(b.start - a.stop >= -min(3, longest / 4) * RATE for a, b in zip(windows, windows[1:], strict=False))
    assert all(b.start > a.stop for a, b in zip(windows, windows[2:], strict=False))
    assert all(0 < window.stop - window.start <= longest * RATE for window in windows)
    assert all(0 <= edge <= total for edge in edges)
    loud = levels > max(np.percentile(levels, 10) + 6, -85)
    for first in range(len(levels) - 2):
        if len(levels) >= 50 and loud[first : first + 3].all():
            assert inside(windows, first * FRAME)
    if len(levels) * FRAME <= longest * RATE and windows:
        gaps = [after.start - before.stop for before, after in zip(windows, windows[1:], strict=False)]
        assert all(gap > 0 for gap in gaps), "a recording that fits into one window is only divided at pauses"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_levels_do_not_depend_on_the_blocks(sizes: list[int], seed: int) -> None:
    samples = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    whole, total = frame_levels([samples], RATE)
    pieces, again = frame_levels(np.split(samples, np.cumsum(sizes)[:-1]), RATE)
    assert total == again == len(samples)
    assert len(whole) == -(-len(samples) // FRAME)
    assert np.allclose(whole, pieces, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    edges=st.lists(st.integers(0, 1_000), max_size=12, unique=True),
)
def test_cutting_a_stream_equals_slicing(sizes: list[int], edges: list[int]) -> None:
    samples = np.arange(sum(sizes), dtype=np.float32)
    edges = sorted(edge % (len(samples) + 1) for edge in edges)
    windows = [Window(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < b]
    found = list(cut(np.split(samples, np.cumsum(sizes)[:-1]), windows))
    assert len(found) == len(windows)
    assert all(np.array_equal(piece, samples[w.start : w.stop]) for piece, w in zip(found, windows, strict=True))


@pytest.mark.parametrize("seconds", [1.0, 5.0, 70.0])
def test_silence_has_no_windows(seconds: float) -> None:
    time = np.arange(round(seconds * RATE)) / RATE
    assert plan(silence(seconds)) == []
    assert plan(silence(seconds) + np.float32(0.3)) == [], "an offset is no sound"
    for loudness in (1e-4, 1e-2, 0.3):
        assert plan(hiss(seconds, loudness)) == [], "steady noise is silence, whatever its level"
    assert plan(np.asarray(0.5 * np.sin(2 * np.pi * 50 * time), dtype=np.float32)) == [], "nor is hum"
    assert plan(np.asarray(0.5 * np.sin(2 * np.pi * 440 * time), dtype=np.float32)) == [], "nor a dial tone"


def test_a_click_is_no_speech() -> None:
    samples = hiss(5, 1e-3)
    samples[40_000:40_100] = 0.9
    assert plan(samples) == []


@pytest.mark.parametrize("gain", [1.0, 1e-2, 1e-3])
def test_quiet_voices_are_heard(gain: float) -> None:
    """At 1e-3 the loudest sample of a 16-bit recording is 10."""
    samples = np.concatenate([silence(3), voice(4), silence(3)]) * gain
    (window,) = plan(np.asarray(np.round(samples * 32768) / 32768, dtype=np.float32))
    assert abs(window.start / RATE - 2.7) < 0.05
    assert abs(window.stop / RATE - 7.3) < 0.2


@pytest.mark.parametrize("background", ["hiss", "hum", "offset"])
def test_a_voice_over_a_background(background: str) -> None:
    samples = np.concatenate([silence(3), voice(4, loudness=0.1), silence(3)])
    time = np.arange(len(samples)) / RATE
    samples = samples + {"hiss": hiss(10, 0.003), "hum": 0.2 * np.sin(2 * np.pi * 50 * time), "offset": 0.4}[background]
    (window,) = plan(np.asarray(samples, dtype=np.float32))
    assert 2.5 < window.start / RATE < 3.1
    assert 6.8 < window.stop / RATE < 7.6


def test_very_short_recordings() -> None:
    assert plan(voice(0.4)) == [Window(0, 6_400)]
    assert plan(voice(0.01, loudness=0.9)) == [Window(0, 160)]
    assert plan(silence(0.5)) == []


def test_pauses_divide_and_hesitations_do_not() -> None:
    samples = np.concatenate([voice(3), silence(0.6), voice(3), silence(2), voice(3)])
    first, second = plan(samples)
    assert first.start == 0
    assert 6.6 < first.stop / RATE < 7.0
    assert 8.2 < second.start / RATE < 8.4
    assert second.stop == len(samples)


def test_long_speech_is_cut_where_it_is_quiet() -> None:
    """Gaps of 0.3 s at 24.5 and 48 s: the longest windows that the two allow."""
    speech = np.asarray(voice(24.5) + hiss(24.5, 0.05), dtype=np.float32)
    samples = np.concatenate([silence(8), speech, silence(0.3), speech[: 23 * RATE], silence(0.3), speech, silence(8)])
    windows = plan(samples)
    assert len(windows) == 3
    assert windows[0].stop == windows[1].start
    assert windows[1].stop == windows[2].start
    assert 32.5 <= windows[0].stop / RATE <= 32.8
    assert 55.8 <= windows[1].stop / RATE <= 56.1
    assert all(inside(windows, sample) for sample in loud_frames(samples))


def test_windows_too_short_to_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.03 s are too short"):
        plan_windows(np.zeros(10), 3_200, RATE, 0.03)
