"""The script that chooses decoding settings by development data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from tests.asr.tiny_dllm import speech, tiny_model, write_shard
from tests.asr.tiny_mtsk import tiny_model as tiny_mtsk
from tests.recipes.dllm_scripts import run, script
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.mtsk import LlamaMtsk

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
    grid = ["--threshold", 1.0, 1e-6, "--max-rounds", 9, "--draft-threshold", 0.9, "--verify-threshold", 0.2, "--write"]
    grid += ["--draft", "both", "--verify-committed", 0, 1, "--trailing-silence", 0.5, "--gate"]

    # One round at most: only a threshold that commits everything at once, and no second reading, can hold to it.
    run(monkeypatch, decoding, *options, *grid, "--rounds", 1)
    shown = capsys.readouterr().out
    assert "2 real recordings, 3 synthetic utterances, 1 shorter recordings" in shown
    assert shown.count(" | ") == 3 + 3 * 4
    assert "calibration error of words" in shown
    config = DllmAsr.from_pretrained(model).config
    chosen = config.decode
    assert config.encoder.trailing_silence == 0.5
    assert (chosen.confidence_threshold, chosen.max_rounds) == (1e-6, 9)
    assert (chosen.draft, chosen.verify_committed) == ("both", False)

    with pytest.raises(SystemExit, match="nothing stays within 0"):
        run(monkeypatch, decoding, *options, *grid, "--rounds", 0)


def test_the_calibration_error_is_how_far_confidence_is_from_being_right() -> None:
    assert decoding.calibration_error([(0.9, True)] * 9 + [(0.9, False)]) == pytest.approx(0.0)
    assert decoding.calibration_error([(0.95, False)] * 4) == pytest.approx(0.95)
    assert decoding.calibration_error([(0.05, True), (1.0, True)]) == pytest.approx(0.475)
    assert decoding.calibration_error([]) == 0.0


def test_the_gate_keeps_drafts_that_are_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    states = [model.encode([speech(0.5 + 0.2 * seed, seed)])[0][0].clone() for seed in range(4)]
    texts = [" ".join(w.text for w in model.drafts(s[None], torch.tensor([len(s)]))[0]) for s in states]
    entropy, share, error = decoding.find_gate(model, list(zip(states, texts, strict=True)), model.config.decode)
    assert share == 1.0, "every draft is right"
    assert entropy > 0
    assert 0 <= error <= 1
    wrong = [(s, "nothing of the kind at all") for s in states]
    assert decoding.find_gate(model, wrong, model.config.decode)[1] <= 1.0


def test_what_checkpoints_trained_is_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = script("average")
    options = {"config": {"train_draft": False, "train_denoiser": True}}
    for name, value in (("a", 1.0), ("b", 4.0)):
        state = {f"model.{part}.w": torch.full((2,), value) for part in ("adapter", "draft", "encoder")}
        checkpoint = {"state_dict": state, "optimizer_states": [value], "hyper_parameters": {**options, "seed": name}}
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    run(monkeypatch, average, tmp_path / "out", tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    made = torch.load(tmp_path / "out", weights_only=True)
    # The frozen encoder and draft are those of the first: a mean of two encoders is nobody's.
    assert {name.split(".")[1]: w.tolist() for name, w in made["state_dict"].items()} == {
        "adapter": [2.5, 2.5],
        "draft": [1.0, 1.0],
        "encoder": [1.0, 1.0],
    }
    assert made["hyper_parameters"]["seed"] == "a"
    assert made["optimizer_states"] == []
    torch.save({"state_dict": {"model.adapter.w": torch.ones(2)}, "hyper_parameters": options}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="different models"):
        run(monkeypatch, average, tmp_path / "out", tmp_path / "a.ckpt", tmp_path / "other.ckpt")


def test_model_folders_are_averaged_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = script("average")
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    run(monkeypatch, average, tmp_path / "out", tmp_path / "a", tmp_path / "b")
    made = DllmAsr.from_pretrained(tmp_path / "out").state_dict()
    for name, one in models[0].state_dict().items():
        torch.testing.assert_close(made[name], (one + models[1].state_dict()[name]) / 2, atol=2e-3, rtol=2e-3)
    tiny_model(draft_threshold=0.5).save_pretrained(tmp_path / "c")
    with pytest.raises(SystemExit, match="different models"):
        run(monkeypatch, average, tmp_path / "out", tmp_path / "a", tmp_path / "c")
    other = tiny_mtsk()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    other.save_pretrained(tmp_path / "d")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3.0)
    other.save_pretrained(tmp_path / "e")
    run(monkeypatch, average, tmp_path / "out", tmp_path / "d", tmp_path / "e")
    made = LlamaMtsk.from_pretrained(tmp_path / "out").state_dict()
    for name in dict(other.named_parameters()):
        torch.testing.assert_close(made[name], 2 * before[name], atol=2e-3, rtol=2e-3)
    with pytest.raises(SystemExit, match="different models"):
        run(monkeypatch, average, tmp_path / "out", tmp_path / "a", tmp_path / "d")
