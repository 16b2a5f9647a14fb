"""Training: losses fall, a resumed run equals an uninterrupted one, one model starts another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch

from tests import training_runs
from tests.asr.mtsk.training.mtsk_runs import TEXTS, fit, module_of, same, weights_of
from tests.asr.talking import write_parts, write_states, write_video
from tokenthrift.mtsk import LlamaMtsk, MtskDataModule, MtskModule, Rates
from tokenthrift.mtsk.training.clips import Clip, collate
from tokenthrift.mtsk.training.module import module_options, sample_lines
from tokenthrift.mtsk.training.scales import backward_by_scale
from tokenthrift.training.optim import OptimConfig
from tokenthrift.whisper import _mel_filters, log_mel, sinusoids

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("states") / "0.safetensors", TEXTS).parent


def test_training_lowers_the_loss_and_leaves_the_encoders(parts: dict[str, str], states: Path) -> None:
    module = module_of(parts, scales_per_step=1)
    frozen = weights_of(module, "audio_encoder", "video_encoder")
    notes, trainer = fit(module, states, 60, precision="bf16-mixed")
    assert sum(notes.losses[-8:]) < 0.7 * sum(notes.losses[:8])
    assert notes.rates[-1] < 1e-4
    assert same(weights_of(module, "audio_encoder", "video_encoder"), frozen)
    measured = trainer.callback_metrics
    assert {"val/wer", "val/wer_a2_v1", "val/wer_a6_v3", "val/loss_a6_v1"} <= set(measured)
    assert all(math.isfinite(value) for value in measured.values())


def test_what_is_fixed_stays_as_it_was_and_all_else_learns(parts: dict[str, str], states: Path) -> None:
    module = module_of(parts, projector_norm=False, frozen=("lora.layers.0.",), fixed_channels=3, scales_per_step=4)
    before = weights_of(module, "lora", "audio_proj", "video_proj", "markers")
    fit(module, states, 3)
    after = weights_of(module, "lora", "audio_proj", "video_proj", "markers")
    for name, old in before.items():
        if name.startswith("lora.layers.0."):
            assert torch.equal(old, after[name]), name
            continue
        assert not torch.equal(old, after[name]) or "lora" in name, name
        if name.startswith("markers"):
            old, new = old.mT, after[name].mT
        elif name.rsplit(".", 2)[1] != "2":  # not the end of a projector
            continue
        else:
            new = after[name]
        shrunk = new[-3:] / old[-3:]  # by weight decay alone, where there is any
        assert torch.allclose(shrunk, shrunk.flatten()[0].expand_as(shrunk), rtol=1e-5), name


def test_what_cannot_be_fixed_is_refused(parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"begins with 'lora\.layers\.9\.'"):
        module_of(parts, frozen=("lora.layers.9.",))
    module_of(parts, projector_norm=False, fixed_channels=1, frozen=("markers", "audio_proj.0."))  # fixed in two ways
    with pytest.raises(ValueError, match="projector_norm false"):
        module_of(parts, fixed_channels=1)


def test_a_step_encodes_once_for_all_scales(parts: dict[str, str], tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, ["audio video"])
    module = module_of(parts)
    model, encoded, read = module.model, [], []
    for encoder in (model.audio_encoder, model.video_encoder):
        assert encoder is not None
        encoder.register_forward_hook(lambda m, *_: encoded.append(type(m).__name__))
    lm: Any = model.language_model.model
    lm.register_forward_hook(lambda *_: read.append(module.trainer.training))
    fit(module, Path(manifest), 1)
    assert sum(read) == len(model.config.scales) == 4
    assert encoded == ["WhisperEncoder", "AvHubert"] * 2, "once to train, once to validate"


class Gradients(L.Callback):
    """Keeps the gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Lightning calls it."""
        named = pl_module.named_parameters()
        self.steps.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def test_a_step_takes_the_mean_gradient_of_the_batches_that_it_accumulates(parts: dict[str, str], states: Path) -> None:
    def run(accumulate: int, steps: int) -> list[dict[str, torch.Tensor]]:
        still = OptimConfig(learning_rate=1e-12)  # the second batch meets the weights that the first one met
        module, noted = module_of(parts, accumulate=accumulate, optim=still, gradient_clip=1e9), Gradients()
        data = MtskDataModule(str(states), str(states), max_frames=100)
        training_runs.fit(module, data, steps, noted, limit_val_batches=0)
        return noted.steps

    (first, second), (both,) = run(1, 2), run(2, 1)
    assert first.keys() == both.keys()
    for name, own in both.items():
        torch.testing.assert_close(own, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6, msg=name)
    assert not same(first, second)
    with pytest.raises(ValueError, match="accumulate"):
        module_of(parts, accumulate=0)


def test_a_frozen_language_model_stays_as_it_is(parts: dict[str, str], states: Path) -> None:
    module = module_of(parts, train_language_model=False)
    language_model = weights_of(module, "language_model")
    trained = weights_of(module, "lora", "audio_proj", "video_proj", "markers")
    fit(module, states, 2)
    assert same(weights_of(module, "language_model"), language_model)
    after = weights_of(module, "lora", "audio_proj", "video_proj", "markers")
    assert [name for name in trained if torch.equal(trained[name], after[name])] == []


def test_a_resumed_run_equals_an_uninterrupted_one(parts: dict[str, str], states: Path, tmp_path: Path) -> None:
    whole = module_of(parts, scales_per_step=2)
    notes, _ = fit(whole, states, 7, tmp_path)
    resumed = module_of(parts, scales_per_step=2)
    rest, _ = fit(resumed, states, 7, resume=tmp_path / "step=3.ckpt")
    assert rest.losses == notes.losses[3:]
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_trained_language_model_must_be_kept(parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="include_frozen"):
        module_of(parts, include_frozen=False)


def write_clips(folder: Path, streams: list[str]) -> str:
    """A manifest of short clips, each with `audio`, `video` or both."""
    rows = []
    for i, (text, kept) in enumerate(zip(TEXTS, streams, strict=False)):
        soundfile.write(folder / f"{i}.flac", torch.randn(6_400).mul(0.1).clamp(-1, 1).numpy(), 16_000)
        write_video(folder / f"{i}.mkv", np.full((10, 96, 96), 20 * i, np.uint8))
        files = {"audio_filepath": f"{i}.flac", "video_filepath": f"{i}.mkv"}
        files = {name: file for name, file in files.items() if name.split("_")[0] in kept}
        rows.append(json.dumps({**files, "text": text, "duration": 0.4}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(rows))
    return str(folder / "manifest.jsonl")


def test_bf16_throughout_trains_on_sound_and_pictures(parts: dict[str, str], tmp_path: Path) -> None:
    # Lightning's bf16-true makes bf16 the default of all tensors that a step creates, and casts all buffers.
    manifest = write_clips(tmp_path, ["audio video"] * 4)
    module = module_of(parts, video_lora=4)
    rotary: Any = module.model.language_model.model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    before = weights_of(module, "lora", "audio_proj", "video_proj", "video_lora", "markers")
    _mel_filters.cache_clear()
    notes, trainer = fit(module, Path(manifest), 1, precision="bf16-true")
    assert module.model.weight.dtype == torch.bfloat16
    assert all(map(math.isfinite, notes.losses))
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())
    after = weights_of(module, "lora", "audio_proj", "video_proj", "video_lora", "markers")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert moved == {"lora", "audio_proj", "video_proj", "video_lora", "markers"}
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, frequencies)
    assert _mel_filters(80).dtype == torch.float32, "what was made during the step serves other models too"


def test_sounds_and_positions_are_exact_whatever_the_default_precision() -> None:
    samples = torch.linspace(0, 300, 8_000).sin()
    expected = log_mel(samples), sinusoids(1500, 32)
    _mel_filters.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = log_mel(samples), sinusoids(1500, 32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_without_a_stream_trains_the_scales_it_can(parts: dict[str, str], tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, ["audio video", "audio", "audio video", "audio"])
    module = module_of(parts, tasks=("avsr", "asr", "vsr"))
    notes, trainer = fit(module, Path(manifest), 2)
    assert all(math.isfinite(value) for value in notes.losses)
    assert {"val/loss_a2_v0", "val/wer_a6_v0"} <= set(trainer.callback_metrics)
    with pytest.raises(ValueError, match="have audio, and nothing else, which is too little for avsr"):
        fit(module_of(parts), Path(manifest), 2)


def test_a_training_outlives_broken_files(parts: dict[str, str], tmp_path: Path) -> None:
    manifest = Path(write_clips(tmp_path, ["audio video"] * 5))
    (tmp_path / "1.mkv").write_bytes(b"no video")
    (tmp_path / "2.flac").unlink()
    soundfile.write(tmp_path / "4.flac", np.zeros(30 * 16_000 + 1, np.float32), 16_000)
    module = module_of(parts)
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
    # Batches of one clip, so that some have nothing left.
    data = MtskDataModule(str(manifest), str(manifest), max_frames=10)
    with pytest.warns(UserWarning, match="left out") as caught:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4, "two clips, twice"
    assert math.isfinite(trainer.callback_metrics["val/wer"])
    named = [str(w.message) for w in caught if "left out" in str(w.message)]
    for file in ("1.mkv", "2.flac", "4.flac: 30.0 s"):
        assert len([line for line in named if file in line]) == 2, "once for training, once for development"
    assert len([line for line in named if line.endswith("(3 of 5 items so far)")]) == 2


def test_a_validation_outlives_a_batch_that_cannot_be_read(
    parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, logged = module_of(parts), []
    monkeypatch.setattr(module, "log", lambda name, *_, **__: logged.append(name))
    module.on_validation_epoch_start()
    module.validation_step(collate([]), 0)
    module.on_validation_epoch_end()
    assert not logged
    mouth = torch.randint(0, 256, (10, 96, 96), dtype=torch.uint8)
    module.validation_step(collate([Clip("no", torch.randn(6_400) * 0.1, mouth)]), 1)
    module.on_validation_epoch_end()
    assert "val/wer" in logged


def test_items_without_a_stream_in_common_are_refused() -> None:
    sound, lips = Clip("a", torch.zeros(800)), Clip("b", None, torch.zeros(2, 96, 96, dtype=torch.uint8))
    with pytest.raises(ValueError, match="of 3 items of a batch 2 have audio and 1 have video"):
        collate([sound, lips, sound])


def test_both_streams_train_the_adapters_of_the_visual_encoder(parts: dict[str, str]) -> None:
    module = module_of(parts, tasks=("avsr",), video_lora=4)
    assert module.model.video_lora is not None
    frozen = weights_of(module, "video_encoder")
    clips = [Clip("no", torch.randn(6_400) * 0.1, torch.randint(0, 256, (10, 96, 96), dtype=torch.uint8))]
    ids = [module.model.token_ids("no")]
    losses = backward_by_scale(
        lambda encoded, rates: module.model.loss(encoded, ids, rates),
        module.encoded(collate(clips)),
        module.model.config.scales,
    )
    assert len(losses) == 4
    downs = [p for name, p in module.model.video_lora.named_parameters() if "down" in name]
    assert len(downs) == 2
    assert all(p.grad is not None and p.grad.any() for p in downs)
    torch.optim.SGD([p for p in module.model.parameters() if p.requires_grad], 1e-2).step()
    assert all(p.any() for p in downs)
    assert same(weights_of(module, "video_encoder"), frozen)


def test_adapters_of_the_visual_encoder_need_clips(parts: dict[str, str], states: Path) -> None:
    with pytest.raises(ValueError, match="video_lora 4 .* states that have passed it already"):
        fit(module_of(parts, video_lora=4), states, 1)


def test_sound_and_pictures_are_encoded_on_the_way(parts: dict[str, str]) -> None:
    module = module_of(parts)
    clips = [
        Clip(text, torch.randn(4_000 * (i + 2)) * 0.1, torch.zeros(12 * (i + 1), 96, 96, dtype=torch.uint8))
        for i, text in enumerate(TEXTS[:2])
    ]
    encoded = module.encoded(collate(clips))
    assert encoded.audio_lengths is not None
    assert encoded.video_lengths is not None
    assert encoded.audio_lengths.tolist() == [25, 38]
    assert encoded.video_lengths.tolist() == [12, 24]
    loss = module.model.loss(encoded, [module.model.token_ids(text) for text in TEXTS[:2]], Rates(6, 3))
    assert loss.isfinite()
    clips[0].video = None
    assert module.encoded(collate(clips)).video is None


def test_a_trained_model_loads_alone(parts: dict[str, str], states: Path, tmp_path: Path) -> None:
    module = module_of(parts)
    fit(module, states, 2)
    module.model.save_pretrained(tmp_path / "model")
    model = LlamaMtsk.from_pretrained(tmp_path / "model")
    sound, crops = torch.randn(8_000) * 0.1, torch.zeros(12, 96, 96, dtype=torch.uint8)
    (said,) = model.transcribe([sound], [crops], rates=Rates(6, 3))
    (expected,) = module.model.eval().transcribe([sound], [crops], rates=Rates(6, 3))
    assert said.text == expected.text
    assert said.usage.used == 5 + 4


def test_tokens_that_the_language_model_lacks_are_named(parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no token '<\|end_of_text\|>'"):
        module_of(parts, eos="<|end_of_text|>")


def test_checkpoints_of_the_first_release_are_read() -> None:
    flat = {"language_model": "llama", "whisper": None, "tasks": None, "video_rates": [3], "projector_width": 16}
    more = {"learning_rate": 2e-3, "warmup_steps": 4, "strategy": "SS", "seed": 3, "start_from": None, "_class": "x"}
    options = module_options(flat | more)
    config = options.pop("config")
    assert (config.whisper, config.tasks, config.video_rates, config.strategy) == (None, ("avsr",), (3,), "SS")
    assert config.projector_hidden_size == 16
    optim = options.pop("optim")
    assert (optim.learning_rate, optim.warmup_steps) == (2e-3, 4)
    assert options == {"seed": 3, "start_from": None}


def test_a_checkpoint_holds_plain_data(parts: dict[str, str]) -> None:
    module = module_of(parts, scales_per_step=2)
    saved = json.loads(json.dumps(dict(module.hparams)))
    again = MtskModule(**module_options(saved))
    assert again.hparams == module.hparams
    assert again.model.config == module.model.config


def test_a_model_of_video_features_trains_on_states(parts: dict[str, str], states: Path) -> None:
    own = {name: part for name, part in parts.items() if name != "avhubert"}
    module = module_of(own, video_features=64)
    assert module.model.video_encoder is None
    notes, _ = fit(module, states, 2)
    assert all(math.isfinite(value) for value in notes.losses)


def test_lines_of_a_validation_are_some_of_every_pair_of_rates() -> None:
    said = [(f"said {i}", f"read {i}") for i in range(9)]
    lines = sample_lines({Rates(4, 2): said, Rates(16, 5): said[:1]})
    assert len(lines) == 8 + 1
    assert lines[0] == f"{Rates(4, 2)}: 'said 0' read as 'read 0'"
    assert lines[-1].startswith(f"{Rates(16, 5)}: ")
