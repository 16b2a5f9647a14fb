"""How an evaluation compares texts, as in the paper or by Whisper's normalizer, and counts their words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tests.asr.tiny_mtsk import speech, tiny_model
from tokenthrift.backbones.generation import Generation
from tokenthrift.cli import main
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded


@pytest.mark.parametrize(("normalizer", "errors", "words"), [("published", 2, 4), ("whisper", 0, 3)])
def test_texts_are_compared_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalizer: str, errors: int, words: int
) -> None:
    model = tiny_model(audio_rates=(4,), video_rates=(), tasks=("asr",), video=None)
    model.save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "a.flac", speech(1.0, 0).numpy(), 16_000)
    row = {"audio_filepath": "a.flac", "text": "Twenty five favourite colours.", "duration": 1.0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")

    def other_spelling(self: LlamaMtsk, encoded: Encoded, *_: Any, **__: Any) -> dict[Rates, list[Generation]]:
        ids = tuple(self.token_ids("twenty five favorite colors"))
        return {Rates(4): [Generation(ids, (0.9,) * len(ids))] * len(encoded)}

    monkeypatch.setattr(LlamaMtsk, "generate_all", other_spelling)
    out = tmp_path / "report"
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--out", str(out)]
    asked = ["--normalizer", normalizer] if normalizer == "whisper" else []
    assert main(["evaluate", "mtsk", *arguments, *asked]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["normalizer"] == normalizer
    assert report["tables"][0]["title"].endswith(f": 1 items, {words} words")
    assert report["tables"][0]["rows"][0]["WER clean"] == pytest.approx(100 * errors / words)


def test_a_set_without_the_streams_of_any_scale_has_an_empty_table(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")  # sound and lips together, and no other scale
    soundfile.write(tmp_path / "a.flac", speech(1.0, 0).numpy(), 16_000)
    row = {"audio_filepath": "a.flac", "text": "a fox", "duration": 1.0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "report"
    arguments = ["--model", str(tmp_path / "model"), "--data", f"sound={tmp_path}", "--out", str(out)]
    assert main(["evaluate", "mtsk", *arguments]) == 0
    errors = json.loads((out / "report.json").read_text())["tables"][0]
    assert (errors["title"], errors["rows"]) == ("sound: 1 items, 2 words", [])
