"""Training: losses fall, a resumed run equals an uninterrupted one, one model starts another."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests import training_runs
from tests.asr.talking import write_parts, write_states, write_video
from tests.training_runs import Notes
from tokenthrift.mtsk import LlamaMtsk, MtskDataModule, MtskModule, Rates
from tokenthrift.mtsk.convert import mtsk
from tokenthrift.mtsk.training.assembly import AssemblyConfig
from tokenthrift.mtsk.training.clips import Clip, collate
from tokenthrift.mtsk.training.module import module_options
from tokenthrift.mtsk.training.scales import backward_by_scale
from tokenthrift.mtsk.training.start import Origin, carried_over
from tokenthrift.training.optim import OptimConfig
from tokenthrift.whisper import _mel_filters, log_mel, sinusoids

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
TEXTS = ["the lazy dog", "a fox", "five six seven", "there is", "no", "one two", "lay red now", "set blue again"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("states") / "0.safetensors", TEXTS).parent


def module_of(parts: dict[str, str], **options: Any) -> MtskModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "audio_rates": (2, 6),
        "video_rates": (1, 3),
        "bottleneck": 4,
        "projector_hidden_size": 32,
        "include_frozen": True,
        "train_language_model": True,
    }
    return MtskModule(**options_of({**settings, **parts, **options}))


def options_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `MtskModule` from the fields of its configuration beside the others."""
    names = {field.name for field in dataclasses.fields(AssemblyConfig)}
    config = AssemblyConfig(**{name: value for name, value in flat.items() if name in names})
    more = {name: value for name, value in flat.items() if name not in names}
    return {"config": config, "optim": OptimConfig(learning_rate=4e-3, weight_decay=0.1), **more}


def fit(
    module: MtskModule, states: Path, steps: int, folder: Path | None = None, **options: Any
) -> tuple[Notes, L.Trainer]:
    """A run; with a `folder`, a checkpoint of every third step."""
    data = MtskDataModule(str(states), str(states), max_frames=100)
    return training_runs.fit(module, data, steps, folder=folder, **options)


def weights_of(module: MtskModule, *parts: str) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in module.model.state_dict().items() if n.startswith(parts)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


@pytest.mark.parametrize("strategy", ["MS", "SS", "MSS"])
def test_one_pair_of_rates_starts_many(parts: dict[str, str], states: Path, tmp_path: Path, strategy: str) -> None:
    one = module_of(parts, audio_rates=(2,), video_rates=(1,))
    fit(one, states, 3, tmp_path)
    many = module_of(parts, strategy=strategy, start_from=str(tmp_path / "step=3.ckpt"))
    assert same(weights_of(many, "language_model"), weights_of(one, "language_model"))
    for place in "01":
        ours = weights_of(many, f"audio_proj.{place}.")
        theirs = weights_of(one, "audio_proj.0.")
        assert [name.replace(f"proj.{place}", "proj.0") for name in ours] == list(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
    one.model.save_pretrained(tmp_path / "model")
    again = module_of(parts, strategy=strategy, start_from=str(tmp_path / "model"))
    assert same(weights_of(again, "language_model", "audio_proj"), weights_of(many, "language_model", "audio_proj"))


@pytest.mark.parametrize("strategy", ["SS", "MSS"])
def test_one_adapter_for_all_scales_starts_those_of_each(parts: dict[str, str], strategy: str) -> None:
    one = module_of(parts, audio_rates=(2,), video_rates=(1,)).model.eval()
    with torch.no_grad():
        for name, weight in one.lora.named_parameters():
            if "down" in name:
                weight.normal_()
    many = module_of(parts, strategy=strategy).model.eval()
    many.load_state_dict(carried_over(many, one.state_dict(), Origin.of(one.config)))
    clips = [torch.randn(8_000) * 0.1], [torch.zeros(12, 96, 96, dtype=torch.uint8)]
    encoded, ids = one.encode(*clips), [one.token_ids(TEXTS[0])]
    with torch.no_grad():
        expected = one.loss(encoded, ids, Rates(2, 1))
        torch.testing.assert_close(many.loss(encoded, ids, Rates(2, 1)), expected)
    used = {name.split(".")[3] for name, weight in many.lora.named_parameters() if "down" in name and weight.any()}
    assert used == ({"0", "1", "2", "3"} if strategy == "SS" else {"4"})


def test_adapters_of_scales_do_not_start_others(parts: dict[str, str]) -> None:
    for_scales = module_of(parts, strategy="SS").model
    with torch.no_grad():
        for weight in for_scales.lora.parameters():
            weight.fill_(1.0)
    for strategy in ("MS", "MSS"):
        other = module_of(parts, strategy=strategy).model
        filled = carried_over(other, for_scales.state_dict(), Origin.of(for_scales.config))
        assert all(torch.equal(filled[f"lora.{name}"], own) for name, own in other.lora.state_dict().items())
    # Of the four pairs of (2, 6) and (1, 3) this one has the two with 6.
    again = module_of(parts, strategy="SS", audio_rates=(6,)).model
    filled = carried_over(again, for_scales.state_dict(), Origin.of(for_scales.config))
    assert all(filled[f"lora.{name}"].eq(1).all() for name in again.lora.state_dict())
    coarser = module_of(parts, strategy="SS", audio_rates=(12,)).model
    filled = carried_over(coarser, for_scales.state_dict(), Origin.of(for_scales.config))
    assert all(torch.equal(filled[f"lora.{name}"], own) for name, own in coarser.lora.state_dict().items())


def test_a_projector_starts_as_that_of_the_nearest_rate(parts: dict[str, str], tmp_path: Path) -> None:
    many = module_of(parts).model
    many.save_pretrained(tmp_path / "model")
    one = module_of(parts, audio_rates=(5,), video_rates=(1,), start_from=str(tmp_path / "model")).model
    name = "0.weight"
    assert torch.equal(one.state_dict()[f"audio_proj.0.{name}"], many.state_dict()[f"audio_proj.1.{name}"])
    assert torch.equal(one.state_dict()[f"video_proj.0.{name}"], many.state_dict()[f"video_proj.0.{name}"])


def test_what_does_not_fit_stays(parts: dict[str, str]) -> None:
    many = module_of(parts, strategy="SS").model
    given = {"markers": torch.zeros(4, 64), "lora.nothing": torch.zeros(1), "audio_proj.0.0.weight": torch.zeros(1, 1)}
    filled = carried_over(many, given, Origin.of(many.config))
    own = many.state_dict()
    assert filled.keys() == own.keys()
    assert not filled["markers"].any()
    assert torch.equal(filled["audio_proj.0.0.weight"], own["audio_proj.0.0.weight"])


def test_a_start_that_is_gone_is_missed_unless_a_checkpoint_goes_on(
    parts: dict[str, str], states: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.ckpt"
    fit(module_of(parts, strategy="MSS"), states, 3, tmp_path)
    (tmp_path / "step=3.ckpt").rename(gone)
    fit(module_of(parts, strategy="SS", start_from=str(gone)), states, 3, tmp_path)
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="gone"):
        fit(module_of(parts, strategy="SS", start_from=str(gone)), states, 3)
    resumed = module_of(parts, strategy="SS", start_from=str(gone))
    fit(resumed, states, 4, resume=tmp_path / "step=3.ckpt")
    assert resumed.global_step == 4
    converted = mtsk([tmp_path / "step=3.ckpt"])
    assert converted.state_dict().keys() == resumed.model.state_dict().keys()


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
