"""Training: losses fall, a resumed run equals an uninterrupted one, parts trained apart are put together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import soundfile
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tests import training_runs
from tests.asr.tiny_dllm import WIDTH, speech, write_shard, write_whisper
from tests.training_runs import quiet_trainer
from tokenthrift.cli import main
from tokenthrift.dllm_asr import AutoregressiveModule, DllmAsr, DllmAsrDataModule, DllmAsrModule, convert
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of
from tokenthrift.dllm_asr.config import AdapterConfig, DraftConfig
from tokenthrift.dllm_asr.training.batch import Batch
from tokenthrift.dllm_asr.training.config import ExampleConfig, TrainingConfig
from tokenthrift.dllm_asr.training.examples import ResponseBatch, build_batch
from tokenthrift.training.optim import OptimConfig

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
TEXTS = ["the lazy dog", "jumps over", "a fox", "five six seven", "there is", "press the star key", "no", "one two"] * 2


# A CTC head of the default size would take most of the time.
SMALL = DraftConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    shard = write_shard(folder / "0000-slt-0.safetensors", TEXTS)
    words = [[[word, 0.9, 0.1 * i, 0.1 * i + 0.1] for i, word in enumerate(text.split())] for text in TEXTS]
    shard.with_suffix(".drafts.json").write_text(json.dumps(words))
    write_shard(folder / "dev-0000-slt.safetensors", TEXTS[:3])
    return folder


def module_of(
    whisper: Path, kind: type[DllmAsrModule] = DllmAsrModule, *, warmup_steps: int = 2, **options: Any
) -> DllmAsrModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "draft": SMALL,
        "draft_learning_rate": 3e-3,
        "time_mask_prob": 0.05,
    }
    config = TrainingConfig(whisper=str(whisper), **{**settings, **options})
    return kind(config, OptimConfig(learning_rate=3e-3, warmup_steps=warmup_steps))


def fit(
    module: DllmAsrModule, features: Path, steps: int, folder: Path | None = None, validate: int = 4, **options: Any
) -> tuple[list[float], L.Trainer]:
    """Losses of a run; with a `folder`, a checkpoint of every third step."""
    data = DllmAsrDataModule(str(features), max_states=400)
    few: dict[str, Any] = {"val_check_interval": validate, "limit_val_batches": 1}
    notes, trainer = training_runs.fit(module, data, steps, folder=folder, **few, **options)
    return notes.losses, trainer


def weights_of(module: DllmAsrModule, part: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if name.startswith(f"model.{part}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [DllmAsrModule, AutoregressiveModule])
def test_training_lowers_the_losses_and_leaves_the_encoder(
    whisper: Path, features: Path, kind: type[DllmAsrModule]
) -> None:
    module = module_of(whisper, kind)
    encoder = weights_of(module, "encoder")
    losses, trainer = fit(module, features, 50, validate=50)
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    assert same(weights_of(module, "encoder"), encoder)
    measured = trainer.callback_metrics
    assert {"val/wer", "val/draft_wer", "val/wer_0", "val/draft_wer_0", "val/rounds_0"} <= set(measured)
    assert all(math.isfinite(value) for value in measured.values())


def test_a_resumed_run_equals_an_uninterrupted_one(whisper: Path, features: Path, tmp_path: Path) -> None:
    whole = module_of(whisper)
    losses, _ = fit(whole, features, 11, tmp_path)
    for step in (3, 6):  # in the first epoch, and in the second
        resumed = module_of(whisper)
        rest, _ = fit(resumed, features, 11, resume=tmp_path / f"step={step}.ckpt")
        assert rest == losses[step:]
        assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_learning_rates_warm_up_and_decay(whisper: Path, features: Path, warmup: int) -> None:
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    module = module_of(whisper, warmup_steps=warmup, train_denoiser=False, draft_learning_rate=1e-3)
    trainer = quiet_trainer(12, Rates(), limit_val_batches=0)
    trainer.fit(module, datamodule=DllmAsrDataModule(str(features), max_states=400))
    highest = [max(row) for row in rates]
    assert max(highest) == pytest.approx(1e-3)
    assert highest.index(max(highest)) == warmup
    assert highest[-1] < 1e-4
    assert all(len(set(row)) == 1 for row in rates), "one rate for matrices and for biases"


def batches_of(features: Path) -> list[Batch]:
    data = DllmAsrDataModule(str(features), max_states=400)
    data.setup("fit")
    return list(data.train_dataloader())


def test_only_what_is_trained_gets_gradients(whisper: Path, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches_of(features)[0]
    for options, trained in (
        ({"train_denoiser": False}, {"draft"}),
        ({"train_draft": False}, {"backbone"}),
        ({"train_draft": False, "adapter": AdapterConfig(stride=2)}, {"adapter", "backbone"}),
    ):
        module = module_of(whisper, **options)
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        module.training_step(batch, 0).backward()
        got = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None}
        assert got == trained


def test_the_loss_of_a_batch_is_its_own(whisper: Path, features: Path) -> None:
    module = module_of(whisper).eval()
    batches = batches_of(features)
    first = module.denoising_loss(batches[0])[0].item()
    module.denoising_loss(batches[1])
    torch.manual_seed(77)
    assert module.denoising_loss(batches[0])[0].item() == first
    batches[0].seeds[0] += 1
    assert module.denoising_loss(batches[0])[0].item() != first


@pytest.mark.parametrize("kind", [DllmAsrModule, AutoregressiveModule])
def test_every_rate_of_the_adapter_is_trained(
    whisper: Path, features: Path, monkeypatch: pytest.MonkeyPatch, kind: type[DllmAsrModule]
) -> None:
    module = module_of(whisper, kind, adapter=AdapterConfig(pool=2, stride=1, pools=(1, 2, 4, 8))).eval()
    batch, read = batches_of(features)[0], list[list[int]]()
    owner: Any = module.model.backbone if kind is DllmAsrModule else decoder_of(module.model)
    context = owner.context

    def noted(memory: Tensor, mask: Tensor) -> Any:
        read.append(mask.sum(1).tolist())
        return context(memory, mask)

    monkeypatch.setattr(owner, "context", noted)
    losses = set()
    for epoch in range(3):
        batch.seeds[:] = [97 * epoch + row for row in range(len(batch.seeds))]
        losses.add(module.denoising_loss(batch)[0].item())
        rates = module.rates(batch)
        assert read[-1] == [rate.positions for rate in rates]
        assert read[-1] == [-(-n // rate.pool) for n, rate in zip(batch.lengths.tolist(), rates, strict=True)]
    drawn = [module.rates(replace(batch, seeds=[seed] * len(batch.seeds)))[0].pool for seed in range(40)]
    assert set(drawn) == {1, 2, 4, 8}
    assert len(losses) == 3


def test_validation_reads_synthetic_and_real_recordings(whisper: Path, features: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", speech(0.8).numpy(), 16_000)
    rows = [{"audio_filepath": "clip.wav", "text": "the lazy dog", "duration": 0.8}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = CSVLogger(tmp_path / "log")
    trainer = L.Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False)
    data = DllmAsrDataModule(str(features), dev_recordings=str(tmp_path))
    module = module_of(whisper)
    (measured, _) = trainer.validate(module, datamodule=data, verbose=False)
    assert {"val/wer_0", "val/wer_1", "val/rounds_1"} <= {
        name.split("/dataloader")[0] for name in trainer.callback_metrics
    }
    assert [len(rows) for rows in module.validation_rows.values()] == [3, 1]
    row = module.validation_rows[1][0]
    assert row.reference == "the lazy dog"
    lines = (Path(logger.log_dir) / "texts" / "val-texts-000000.txt").read_text().splitlines()
    assert [line[0] for line in lines] == ["0", "0", "0", "1"], "some of every set"
    assert lines[-1] == f"1: 'the lazy dog' drafted '{row.draft}', written '{row.text}'"


@pytest.fixture(scope="module")
def apart(whisper: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a draft and of a denoiser trained apart."""
    folder = tmp_path_factory.mktemp("apart")
    fit(module_of(whisper, train_denoiser=False), features, 3, folder / "draft")
    fit(module_of(whisper, train_draft=False), features, 3, folder / "denoiser")
    return {name: folder / name / "step=3.ckpt" for name in ("draft", "denoiser")}


def trained(checkpoint: Path, part: str) -> dict[str, Tensor]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith(f"model.{part}.")}


@pytest.mark.parametrize("order", [("draft", "denoiser"), ("denoiser", "draft")])
def test_parts_trained_apart_make_one_model(apart: dict[str, Path], tmp_path: Path, order: tuple[str, str]) -> None:
    out = tmp_path / "model"
    assert main(["convert", "dllm_asr", *(str(apart[name]) for name in order), str(out)]) == 0
    model = DllmAsr.from_pretrained(out)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for part, source in (("draft", "draft"), ("backbone", "denoiser"), ("encoder", "denoiser")):
        for name, value in trained(apart[source], part).items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5)
    assert not same(trained(apart["draft"], "draft"), trained(apart["denoiser"], "draft"))
    assert len(model.transcribe([speech(0.5)])) == 1


def test_training_starts_from_what_was_trained(whisper: Path, apart: dict[str, Path], tmp_path: Path) -> None:
    module = module_of(whisper, train_draft=False, start_from=[str(apart["draft"])])
    assert same(weights_of(module, "draft"), trained(apart["draft"], "draft"))
    assert not same(weights_of(module, "backbone"), trained(apart["denoiser"], "backbone"))
    assert module.has_draft
    assert not module_of(whisper, train_draft=False).has_draft
    module.model.save_pretrained(tmp_path / "model")
    again = module_of(whisper, start_from=[str(tmp_path / "model"), str(apart["denoiser"])])
    assert same(weights_of(again, "draft"), trained(apart["draft"], "draft"))
    assert same(weights_of(again, "backbone"), trained(apart["denoiser"], "backbone"))


def test_a_model_keeps_the_encoder_that_it_was_trained_with(whisper: Path, features: Path, tmp_path: Path) -> None:
    module = module_of(whisper)
    torch.nn.init.normal_(module.model.encoder.layer_norm.weight, generator=torch.Generator().manual_seed(1))
    module.model.save_pretrained(tmp_path / "model")
    later = module_of(whisper, train_draft=False, start_from=[str(tmp_path / "model")])
    fit(later, features, 3, tmp_path)
    converted = convert.dllm_asr([tmp_path / "step=3.ckpt"])
    assert isinstance(converted, DllmAsr)
    assert torch.equal(converted.encoder.layer_norm.weight, module.model.encoder.layer_norm.weight)


def test_parts_trained_with_other_encoders_are_not_put_together(apart: dict[str, Path], tmp_path: Path) -> None:
    other = torch.load(apart["draft"], weights_only=True)
    other["state_dict"]["model.encoder.layer_norm.weight"] += 1
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt was trained on another encoder than"):
        convert.dllm_asr([tmp_path / "other.ckpt", apart["denoiser"]])


@pytest.mark.parametrize(("share", "whole"), [(1.0, True), (0.0, False)])
def test_fully_masked_rows_are_as_many_as_asked_for(
    whisper: Path, features: Path, monkeypatch: pytest.MonkeyPatch, share: float, whole: bool
) -> None:
    module, made = module_of(whisper, examples=ExampleConfig(from_draft_prob=0.0, fully_masked_prob=share)), []

    def noted(*given: Any, **options: Any) -> ResponseBatch:
        made.append(build_batch(*given, **options))
        return made[-1]

    monkeypatch.setattr("tokenthrift.dllm_asr.training.module.build_batch", noted)
    for batch in batches_of(features):
        module.denoising_loss(batch)
    assert all(bool((row.corrupted.masked | ~row.mask).all()) for row in made) == whole


def test_the_baseline_is_made_of_its_checkpoint(whisper: Path, features: Path, tmp_path: Path) -> None:
    module = module_of(whisper, AutoregressiveModule, train_draft=False)
    fit(module, features, 3, tmp_path)
    baseline = convert.autoregressive([tmp_path / "step=3.ckpt"])
    assert isinstance(baseline, AutoregressiveDecoder)
    assert isinstance(module, AutoregressiveModule)
    assert same(dict(baseline.decoder.state_dict()), dict(module.decoder.state_dict()))
    memory, mask = torch.randn(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool)
    assert len(baseline.decode(memory, mask)) == 2


def test_other_checkpoints_are_refused(
    whisper: Path, apart: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert main(["convert", "dllm_asr", str(tmp_path / "other.ckpt"), str(tmp_path / "out")]) != 0
    assert "is no checkpoint of a dLLM-ASR training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    foreign = torch.load(apart["draft"], weights_only=True)
    foreign["state_dict"]["model.draft.extra"] = torch.zeros(1)
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt: .*of another model"):
        module_of(whisper, start_from=[str(tmp_path / "foreign.ckpt")])
