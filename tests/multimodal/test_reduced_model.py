"""A model as harnesses ask it: pictures and clips, any family, any reducer; tests/harnesses run the harnesses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.media_files import film
from tests.multimodal.tiny_processors import save_internvl, save_llava, save_llava_of_pictures, save_qwen, save_qwen3
from tokenthrift.harnesses.reduced_model import ReducedModel
from tokenthrift.reducers import REDUCERS

PICTURE = Path(__file__).resolve().parents[2] / "samples/pictures/street.jpg"
FRAMES = 4
# A picture is one item; a clip is one, or as many as it has frames.
FAMILIES: dict[str, tuple[Callable[[Path], str], int]] = {
    "llava_onevision": (save_llava, 1),
    "qwen2_5_vl": (save_qwen, 1),
    "qwen3_vl": (save_qwen3, 1),
    "internvl": (save_internvl, FRAMES),
    "llava": (save_llava_of_pictures, FRAMES),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds."""
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", 30, rate=10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    saved: dict[str, str] = {}

    def save(family: str) -> str:
        if family not in saved:
            saved[family] = FAMILIES[family][0](tmp_path_factory.mktemp(family) / "model")
        return saved[family]

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_clips_in_any_order(family: str, source: Callable[[str], str], clip: Path) -> None:
    picture, model = Image.open(PICTURE), ReducedModel(source(family), "merging", 2, num_frames=FRAMES)
    for visuals in ([], [picture], [clip], [clip, picture, clip]):
        answer = model.answer("what is it", visuals, max_new_tokens=3)
        items = sum(FAMILIES[family][1] if visual is clip else 1 for visual in visuals)
        assert [item.used for item in answer.usage] == [2] * items
        assert all(item.native > 2 for item in answer.usage)
        assert 0 < answer.output_tokens <= 3


@pytest.mark.parametrize("reducer", [*sorted(REDUCERS), "tome", "vqtoken", "none"])
def test_any_reducer(reducer: str, source: Callable[[str], str], clip: Path) -> None:
    budget = None if reducer == "none" else "50%"
    model = ReducedModel(source("llava_onevision"), reducer, budget, num_frames=FRAMES)
    answer = model.answer("what is it", [clip], max_new_tokens=2)
    assert (len(answer.usage) == 0) == (reducer == "none")


def test_a_clip_keeps_its_frames_and_their_times(
    source: Callable[[str], str], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without times, Qwen3-VL's processor takes 24 frames a second, and of 8 frames keeps 4."""
    model = ReducedModel(source("qwen3_vl"), "merging", "50%", num_frames=8)
    seen: list[Any] = []
    process = model.processor
    monkeypatch.setattr(model, "processor", Recorder(process, seen))
    model.answer("what is it", [clip], max_new_tokens=1)
    text = process.tokenizer.decode(seen[0]["input_ids"][0]).replace(" ", "")
    # Frames 0, 4, 8, 12 ... of 30 at 10 a second, two of them a time: the means of 0.0 and 0.4, 0.8 and 1.2, ...
    assert [float(t) for t in re.findall(r"<([\d.]+)seconds>", text)] == [0.2, 1.0, 1.8, 2.6]
    assert seen[0]["video_grid_thw"][0, 0] == 4


class Recorder:
    """A processor that keeps what it gave."""

    def __init__(self, own: Any, seen: list[Any]) -> None:
        self.own, self.seen = own, seen

    def __call__(self, **given: Any) -> Any:
        self.seen.append(self.own(**given))
        return self.seen[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def test_a_rate_asks_for_the_duration_of_a_clip(source: Callable[[str], str], clip: Path) -> None:
    (usage,) = ReducedModel(source("qwen2_5_vl"), "merging", "1/s", num_frames=FRAMES).answer("what", [clip]).usage
    assert usage.used == 3


def test_what_is_neither_is_refused(source: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="visuals are pictures or paths, not \\['bytes'\\]"):
        ReducedModel(source("llava_onevision")).answer("what", [b"x"])
