"""Recordings with lips through the batch job: which streams a window has, what it may cost, what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.asr.talking import SquareFinder, face, write_video
from tests.asr.tiny_mtsk import tiny_model
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import film, voice, write
from tokenthrift import cli
from tokenthrift.budget import (
    BudgetError,
    BudgetLike,
    BudgetSupport,
    DecodeLike,
    ItemSize,
    SizeLike,
    TokenBudget,
    TokenUsage,
)
from tokenthrift.mtsk.audiovisual import lips
from tokenthrift.transcript import AudioVisualRecognizer, Transcript
from tokenthrift.transcription.job import Transcriber
from tokenthrift.transcription.lips import lips_windows, streams_of
from tokenthrift.transcription.windows import Window
from tokenthrift.whisper import states_of

SILENCE = np.zeros(32_000, np.float32)


class Reader:
    """Writes how many samples and frames it was given; a file's lips are said by its name: `lips-50.wav`."""

    support = BudgetSupport(fields=frozenset({"max_tokens"}))
    sample_rate, frame_rate, max_seconds = 16_000, 25, 30.0

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.options: list[dict[str, object]] = []

    def accepts(self, *, audio: bool, video: bool) -> bool:
        return (audio and video) or (self.alone and (audio or video))

    def read_lips(self, path: Path) -> Tensor | None:
        if "noface" in path.name:
            raise ValueError("no face")
        frames = int(path.stem.split("-")[1]) if "-" in path.stem else 0
        return torch.arange(frames, dtype=torch.uint8)[:, None, None].expand(-1, 96, 96) if frames else None

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        limit = TokenBudget.parse(budget)  # type: ignore[arg-type]
        for frames in (item.frames or 0 for item in items if isinstance(item, ItemSize)):
            if limit.max_tokens is not None and frames > limit.max_tokens:
                raise BudgetError(f"{frames} frames", "fewer", limit.max_tokens)
        return tuple(TokenUsage(native=1, cap=1, used=1) for _ in items)

    def transcribe(
        self,
        audio: Sequence[Tensor | None],
        video: Sequence[Tensor | None],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        *,
        decode: DecodeLike = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
    ) -> list[Transcript]:
        self.options.append({"budget": budget, "coarse_to_fine": coarse_to_fine, "noise_aware": noise_aware})
        texts = []
        for samples, frames in zip(audio, video, strict=True):
            sound = "none" if samples is None else f"{len(samples) / 16_000:.1f}"
            lips = "none" if frames is None else f"{int(frames[0, 0, 0])}..{int(frames[-1, 0, 0])}"
            texts.append(f"sound {sound} lips {lips}")
        return [Transcript(text, (), TokenUsage(native=1, cap=1, used=1)) for text in texts]


def test_windows_of_lips_are_equal_and_short_enough() -> None:
    windows = lips_windows(1501, 25, 16_000, 30.0)
    assert len(windows) == 3
    assert (windows[0].start, windows[-1].stop) == (0, 1501 * 640)
    assert all(a.stop == b.start for a, b in zip(windows, windows[1:], strict=False))
    assert max(w.stop - w.start for w in windows) <= 30 * 16_000
    assert lips_windows(0, 25, 16_000, 30.0) == []


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_there_is_used_and_what_is_missing_is_said(tmp_path: Path, alone: bool) -> None:
    tone = voice(2.0)
    later = np.concatenate([np.zeros(48_000, np.float32), tone])
    files = {
        "both-50.wav": (tone, "sound 2.0 lips 0..49", "sound 2.0 lips 0..49"),
        "later-125.wav": (later, "lips 6", "lips 6"),
        "short-20.wav": (tone, "sound 2.0 lips 0..19", "sound 2.0 lips 0..19"),
        "sound.wav": (tone, "sound 2.0 lips none", "no lips"),
        "noface.wav": (tone, "sound 2.0 lips none", "no face"),
        "silent-50.wav": (SILENCE, "sound none lips 0..49", ""),
        "silent.wav": (SILENCE, "", ""),
    }
    paths = [write(tmp_path / name, samples) for name, (samples, _, _) in files.items()]
    paths.append(film(tmp_path / "mute-50.mp4", 50))
    reader = Reader(alone=alone)
    assert isinstance(reader, AudioVisualRecognizer)
    results = Transcriber(reader).transcribe(*paths)
    expected = [pair[0 if alone else 1] for _, *pair in files.values()]
    expected.append("sound none lips 0..49" if alone else "no audio track")
    for result, wanted in zip(results, expected, strict=True):
        found = result.error or result.text
        assert wanted in found if wanted else found == "", f"{result.path.name}: {found}"
    assert results[0].seconds == pytest.approx(2.0, abs=0.1)


def test_a_window_that_costs_too_much_takes_only_its_own_recording_with_it(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, voice(2.0)) for name in ("few-10.wav", "many-40.wav")]
    reader = Reader(alone=True)
    job = Transcriber(reader, budget=20, coarse_to_fine=True, noise_aware=True)
    few, many = job.transcribe(*paths)
    assert few.error is None
    assert many.error == "40 frames; allowed: fewer; nearest legal value: 20"
    assert reader.options == [{"budget": TokenBudget(max_tokens=20), "coarse_to_fine": True, "noise_aware": True}]


def test_a_model_of_one_rate_refuses_ceilings() -> None:
    with pytest.raises(BudgetError, match="no ceiling"):
        Transcriber(FakeRecognizer(), budget=TokenBudget(max_tokens=5))
    with pytest.raises(ValueError, match="one rate"):
        Transcriber(FakeRecognizer(), noise_aware=True)
    with pytest.raises(BudgetError, match="retention"):
        Transcriber(Reader(alone=True), budget="50%")


def test_a_waiting_window_holds_its_own_frames_alone() -> None:
    whole = torch.zeros(1_500, 96, 96, dtype=torch.uint8)
    video = streams_of(Reader(alone=True), None, whole, Window(0, 16_000), None).video
    assert video is not None
    assert video.shape == (25, 96, 96)
    assert video.untyped_storage().nbytes() == 25 * 96 * 96


def test_the_command_takes_sound_and_film_under_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lips, "_FaceFinder", SquareFinder)
    tiny_model(tasks=("avsr", "asr", "vsr")).save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.wav", voice(2.0))
    write_video(tmp_path / "in" / "b.mkv", np.stack([face()] * 50), samples=torch.from_numpy(voice(2.0)))
    common = ["--model", str(tmp_path / "model"), "--out-dir", str(tmp_path / "out"), "--format", "json"]
    assert cli.main(["transcribe", str(tmp_path / "in"), *common, "--budget", "10/s"]) == 0
    for name, native in (("a", states_of(32_000)), ("b", states_of(32_000) + 50)):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert found["windows"] == 1
        assert found["usage"]["native"] == native, "states of the sound, and frames of the lips"
        assert 0 < found["usage"]["used"] <= found["usage"]["cap"] <= 10 * found["seconds"]
    assert cli.main(["transcribe", str(tmp_path / "in"), *common, "--overwrite", "--budget", "2"]) == 1
    assert cli.main(["transcribe", str(tmp_path / "in"), *common, "--overwrite", "--budget", "e0.1"]) == 2
