"""The script that chooses decoding settings by development data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile

from tests.asr.tiny_dllm import speech, tiny_model, write_shard
from tests.recipes.dllm_scripts import run, script
from tokenthrift.dllm_asr import DllmAsr

decoding = script("decoding")


def test_the_best_setting_within_the_rounds_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, dev = tmp_path / "model", tmp_path / "dev"
    tiny_model().save_pretrained(model)
    dev.mkdir()
    texts = {"a.flac": "the quick brown fox", "b.flac": "too short", "c.flac": "over the lazy dog"}
    for name in texts:
        soundfile.write(dev / name, speech(1.0).numpy(), 16_000)
    rows = [json.dumps({"audio_filepath": name, "text": text}) for name, text in texts.items()]
    (dev / "manifest.jsonl").write_text("\n".join(rows))
    write_shard(tmp_path / "features" / "dev-0000-slt.safetensors", ["the dog", "a", "jumps over"])
    options = [model, "--dev", dev, "--features", tmp_path / "features"]
    grid = ["--threshold", 1.0, 1e-6, "--max-rounds", 9, "--draft-threshold", 0.9, "--verify", 0.2, "--write"]

    # One round at most: only a threshold that commits everything at once can hold to it.
    run(monkeypatch, decoding, *options, *grid, "--rounds", 1)
    shown = capsys.readouterr().out
    assert "2 real recordings, 3 synthetic utterances" in shown
    assert shown.count(" | ") == 2 + 2 * 2
    chosen = DllmAsr.from_pretrained(model).config.decode
    assert (chosen.confidence_threshold, chosen.max_rounds) == (1e-6, 9)

    with pytest.raises(SystemExit, match="nothing stays within 0"):
        run(monkeypatch, decoding, *options, *grid, "--rounds", 0)
