"""Training of the answerer: losses fall, resuming is exact, the second stage starts from the first; evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from tests import training_runs
from tests.media_files import film
from tests.processes import in_this_group, together
from tests.tokenizers.vqtoken.tiny_answerer import DATA, SIZES, tiny_answerer
from tokenthrift.cli import main
from tokenthrift.quality import read_quality
from tokenthrift.training.optim import OptimConfig
from tokenthrift.training.random_state import RandomState
from tokenthrift.vqtoken import AttentionConfig, VideoAnswerer, VQTokenConfig, VQTokenDataModule, VQTokenModule
from tokenthrift.vqtoken.evaluation import evaluate
from tokenthrift.vqtoken.evaluation.baselines import BASELINES
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig
from tokenthrift.vqtoken.synthetic.data import ClipBatch, SyntheticClips, collate

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


def module_of(optim: OptimConfig | None = None, sizes: dict[str, Any] | None = None, **options: Any) -> VQTokenModule:
    torch.manual_seed(0)
    sizes = {**SIZES, **(sizes or {})}
    attention = AttentionConfig(hidden_size=sizes["token_dim"], num_attention_heads=4, intermediate_size=80)
    config = AnswererConfig(**sizes, vqtoken=VQTokenConfig(attention=attention))
    optim = optim or OptimConfig(learning_rate=3e-3, warmup_steps=2)
    return VQTokenModule(config, optim, **{"token_counts": [4, 9], **options})


def fit(
    module: VQTokenModule, steps: int, folder: Path | None = None, resume: Path | None = None, clips: int = 8
) -> tuple[list[float], L.Trainer]:
    data = VQTokenDataModule(train_clips=clips, batch_size=2, dev_clips=2, **DATA)
    notes, trainer = training_runs.fit(module, data, steps, RandomState(), folder=folder, resume=resume)
    return notes.losses, trainer


def batch(count: int = 4) -> ClipBatch:
    clips = SyntheticClips("train", count, num_frames=4, image_size=16, questions_per_clip=4)
    return collate([clips[i] for i in range(count)], 4)


def overfit(module: VQTokenModule, items: ClipBatch, steps: int) -> tuple[float, float]:
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module.training_step(items, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("stage", ["encoder", "answers"])
def test_a_few_clips_can_be_learnt(stage: Any) -> None:
    first, last = overfit(module_of(stage=stage, mix={"vqtoken": 1.0}, encoder_learning_rate=1e-3), batch(), 60)
    assert last < 0.4 * first


@pytest.mark.parametrize("stage", ["encoder", "answers"])
def test_gradients_reach_what_the_stage_trains_and_nothing_else(stage: Any) -> None:
    module = module_of(stage=stage, mix={"vqtoken": 1.0})
    overfit(module, batch(), 2)
    parts = {"encoder": {"encoder", "project"}, "answers": {"vqtoken", "read", "lm"}}[stage]
    got = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None and name[:5] == "model"}
    assert got == parts
    assert not [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = module_of()
    losses, trainer = fit(whole, 7, tmp_path)
    assert {"val/full", "val/vqtoken", "val/random"} <= set(trainer.callback_metrics)
    for step in (3, 6):  # in the first epoch of four batches, and in the second
        resumed = module_of()
        rest, _ = fit(resumed, 7, resume=tmp_path / f"step={step}.ckpt")
        assert rest == losses[step:]
        ours, theirs = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    first = module_of(stage="encoder")
    _, trainer = fit(first, 3, tmp_path)
    assert {"val/color_of_shapes", "val/name_of_background"} <= set(trainer.callback_metrics)
    torch.manual_seed(5)
    second = module_of(
        start_from=str(tmp_path / "step=3.ckpt"), sizes={"num_hidden_layers": 2}
    )  # another language model is no hindrance
    assert torch.equal(second.model.project.weight, first.model.project.weight)
    before = second.model.project.weight.clone()
    fit(second, 2)
    assert torch.equal(second.model.project.weight, before)
    second.model.save_pretrained(tmp_path / "model")
    third = module_of(start_from=str(tmp_path / "model"), sizes={"num_hidden_layers": 2})
    assert torch.equal(third.model.lm.lm_head.weight, second.model.lm.lm_head.weight)
    with pytest.raises(ValueError, match="other sizes"):
        module_of(start_from=str(tmp_path / "step=3.ckpt"), sizes={"encoder_hidden_size": 32})


@pytest.mark.parametrize("stage", ["encoder", "answers"])
def test_test_clips_are_judged_like_development_clips(stage: Any) -> None:
    module, data = (
        module_of(stage=stage),
        VQTokenDataModule(batch_size=2, train_clips=2, dev_clips=4, test_clips=2, **DATA),
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (tested,) = trainer.test(module, data, verbose=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert all(name.startswith("test/") for name in tested)
    assert ("test/vqtoken" if stage == "answers" else "test/color_of_shapes") in tested
    (again,) = trainer.test(module, data.val_dataloader(), verbose=False)
    assert again == {name.replace("val/", "test/"): share for name, share in validated.items()}


def test_tokens_are_named_after_what_most_of_them_shows() -> None:
    module, items = module_of(), batch()
    tokens = module.encode(items)
    shapes = items.patch_labels[..., 2].flatten(1)
    assert torch.equal(module.shown(tokens, None, items), shapes)
    few, maps = module.reduced(tokens, "uniform", 9)
    assert torch.equal(module.shown(few, maps, items), shapes.gather(1, few.positions))
    codes, maps = module.reduced(tokens, "vqtoken", 9)
    assert maps is not None
    shown = module.shown(codes, maps, items)
    for row, index_map, truth in zip(shown, maps, shapes, strict=True):
        sure = [k for k in range(9) if len(truth[index_map == k].unique()) == 1]
        assert [int(truth[index_map == k][0]) for k in sure] == row[sure].tolist()


def test_random_tokens_of_a_clip_follow_from_its_seed_and_not_from_its_neighbors() -> None:
    module, items = module_of(), batch()
    tokens = module.encode(items)
    together, _ = module.reduced(tokens, "random", 9, items.seeds)
    assert len({tuple(row) for row in together.positions.tolist()}) == 4
    for i, seed in enumerate(items.seeds):
        alone, _ = module.reduced(tokens.select([i]), "random", 9, [seed])
        assert torch.equal(alone.positions[0], together.positions[i])
    clips = SyntheticClips("train", 4, num_frames=4, image_size=16, questions_per_clip=4)
    assert items.seeds == [clips[0, i].seed for i in range(4)]
    assert not set(items.seeds) & {clips[1, i].seed for i in range(4)}


def test_naming_is_cheapest_when_all_words_of_the_shape_are_predicted() -> None:
    module, items = module_of(), batch(2)
    assert items.shape_words[0, 1:3].all()
    assert not items.shape_words[:, 0].any()
    vocabulary = module.model.lm.lm_head.weight
    module.model.lm.lm_head = torch.nn.Identity()
    shown, mask = torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]])
    scores = torch.full((1, 3, len(vocabulary)), -30.0)
    scores[0, 0, items.shape_words[0, 1]] = 0.0
    scores[0, 1, 0] = 0.0
    loss = module.naming_loss(scores, mask, shown, items.shape_words[:1])
    assert loss.item() == pytest.approx(math.log(5), abs=1e-4)
    scores[0, 0] = scores[0, 1]
    assert module.naming_loss(scores, mask, shown, items.shape_words[:1]).item() > 20


def test_every_kind_of_tokens_can_be_trained_on() -> None:
    for kind in ("full", "vqtoken", *BASELINES):
        first, last = overfit(module_of(mix={kind: 1.0}, token_counts=[8]), batch(2), 6)
        assert last < first
    with pytest.raises(ValueError, match="pruning"):
        module_of(mix={"full": 0.5, "pruning": 0.5})


def test_the_encoder_learns_more_slowly_where_it_learns_with_the_answers() -> None:
    module = module_of(encoder_learning_rate=1e-4)
    module.trainer = L.Trainer(max_steps=10, logger=False, accelerator="cpu", enable_checkpointing=False)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {group["initial_lr"] for group in groups} == {1e-4, 3e-3}


def train_in_group(folder: Path, resume: str | None = None) -> dict[str, Any]:
    """Two epochs of six clips, three a step and process, as `together` runs it; gives seeds of clips and losses."""
    module = module_of(mix={"vqtoken": 0.5, "random": 0.5})
    alone = not torch.distributed.is_initialized()
    notes, trainer = training_runs.fit(
        module,
        VQTokenDataModule(train_clips=6, batch_size=2 if alone else 1, dev_clips=3, **DATA),
        -1,
        folder=folder,
        every=1,
        resume=resume,
        attribute="seeds",
        max_epochs=2,
        **({} if alone else in_this_group()),
    )
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    return {"seeds": notes.seen, "losses": notes.losses, "figures": figures, "weights": weights}


def resumed_in_group(folder: Path, checkpoint: Path) -> dict[str, Any]:
    return train_in_group(folder, str(checkpoint))


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    for name in ("meet", "meet2"):
        (tmp_path / name).mkdir()
    one = train_in_group(tmp_path / "one")
    first, second = together(tmp_path / "meet", train_in_group, tmp_path / "two")
    assert len(first["seeds"]) == len(one["seeds"]) == 6
    assert [a + b for a, b in zip(first["seeds"], second["seeds"], strict=True)] == one["seeds"]
    assert all(len({seed for step in one["seeds"][half] for seed in step}) == 6 for half in (slice(3), slice(3, 6)))
    losses = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert losses == pytest.approx(one["losses"], rel=1e-4)
    assert first["figures"] == second["figures"] == pytest.approx(one["figures"], abs=1e-6)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-4)
    again, other = together(tmp_path / "meet2", resumed_in_group, tmp_path / "three", tmp_path / "two" / "step=4.ckpt")
    assert again["seeds"] == first["seeds"][4:]
    assert other["seeds"] == second["seeds"][4:]
    assert again["losses"] == first["losses"][4:]


def test_the_kind_of_tokens_of_a_step_follows_from_its_number() -> None:
    module = module_of(mix={"full": 0.5, "vqtoken": 0.5})
    draws = [module.draw(step) for step in range(40)]
    assert draws == [module.draw(step) for step in range(40)]
    assert len(set(draws)) == 4


def test_the_command_evaluates_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", tmp_path / "backgrounds" / "test"
    tiny_answerer().save_pretrained(model)
    data.mkdir(parents=True)
    np.save(data / "noise.npy", np.random.default_rng(0).integers(0, 256, (9, 20, 20, 3), dtype=np.uint8))
    options = ["--count", "2", "--seeds", "2", "--tokens", "8", "32", "--errors", "0.5"]
    command = ["evaluate", "vqtoken", "--model", str(model), "--data", str(data.parent), "--out", str(tmp_path / "r")]
    assert main([*command, *options]) == 0
    assert "Accuracy against tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    accuracy = {(row["method"], row["budget"]): row for row in report["tables"][0]["rows"]}
    assert {name for name, _ in accuracy} == {"all tokens", *BASELINES, "VQToken", "VQToken, adaptive"}
    for (name, budget), row in accuracy.items():
        assert (
            row["tokens"] == 64 if name == "all tokens" else row["tokens"] <= (int(budget) if budget.isdigit() else 32)
        )
        assert 0 <= row["accuracy %"] <= 100
        assert row["density %/token"] == pytest.approx(row["accuracy %"] / row["tokens"])
        assert row["language model MFLOP"] > 0
    assert accuracy["VQToken", "8"]["language model MFLOP"] < accuracy["all tokens", "-"]["language model MFLOP"]
    assert accuracy["VQToken", "32"]["reducer MFLOP"] > accuracy["uniform", "32"]["reducer MFLOP"] == 0
    assert report["settings"]["native tokens"] == 64
    curve = read_quality(model)["video"]
    assert curve.tokens == (4, 5, 6, 8, 12, 32)
    ours = {int(b): row["accuracy %"] / 100 for (name, b), row in accuracy.items() if name == "VQToken"}
    assert dict(zip(curve.tokens, curve.quality, strict=True)) == pytest.approx(ours, abs=1e-3)
    assert len(report["tables"]) == 4
    assert (tmp_path / "r" / "accuracy.png").stat().st_size > 1000


def test_the_command_measures_real_clips_too_and_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, clips = tmp_path / "model", tmp_path / "backgrounds" / "test", tmp_path / "clips"
    tiny_answerer().save_pretrained(model)
    data.mkdir(parents=True)
    np.save(data / "noise.npy", np.random.default_rng(0).integers(0, 256, (9, 20, 20, 3), dtype=np.uint8))
    film(clips / "a.mp4", 12)
    (clips / "empty.mp4").write_bytes(b"")
    options = ["--count", "1", "--seeds", "2", "--tokens", "8", "--errors", "0.35", "--out", str(tmp_path / "r")]
    command = ["evaluate", "vqtoken", "--model", str(model), "--data", str(data.parent), *options, "--clips"]
    assert main([*command, str(clips)]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["figures"] == ["accuracy.png", "reconstruction.png"]
    real = {table["title"]: table["rows"] for table in report["tables"]}["Real clips: reconstruction of the features"]
    assert [row["budget"] for row in real if row["method"] == "VQToken, adaptive"] == ["e0.35"]
    assert any("64 to 64 native tokens each" in note for note in report["notes"])
    assert any("Left out: empty.mp4" in note for note in report["notes"])
    assert [row["clip"] for row in report["tables"][-1]["rows"]] == ["a.mp4"]
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("measured before the clips were found"))
    capsys.readouterr()
    assert main([*command, str(tmp_path / "misspelt")]) == 2
    assert "misspelt: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--errors", "1.5"), ("--errors", "nan"), ("--tokens", "0")])
def test_figures_that_nothing_can_reach_are_wrong_usage(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "vqtoken", "--model", "m", "--data", "d", "--out", "o", option, value])
    assert caught.value.code == 2
    assert f"argument {option}: '{value}' is not a" in capsys.readouterr().err


def test_questions_are_read_without_drawing() -> None:
    clips = SyntheticClips("dev", 3, num_frames=4, image_size=16, questions_per_clip=4)
    assert [clips.questions_of(number) for number in range(3)] == [clips[number].questions for number in range(3)]


def test_what_cannot_be_read_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "vqtoken", "--data", str(tmp_path), "--out", str(tmp_path), "--model"]
    assert main([*command, str(tmp_path / "none")]) == 2
    tiny_answerer().save_pretrained(tmp_path / "model")
    assert main([*command, str(tmp_path / "model")]) == 2
    assert "no backgrounds" in capsys.readouterr().err
    assert isinstance(VideoAnswerer.from_pretrained(tmp_path / "model"), VideoAnswerer)
