"""Training of a MultimodalLM: it learns, goes on where it stopped, becomes a model, and is measured into curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.multimodal.tiny_multimodal import save_language_model, tiny_config, write_data
from tests.tokenizers.karl.tiny_karl import tiny_karl
from tokenthrift.cli import main
from tokenthrift.multimodal_lm import MultimodalDataModule, MultimodalLM, MultimodalModule
from tokenthrift.multimodal_lm.config import LoraConfig
from tokenthrift.multimodal_lm.questions import Questions, prompt_of
from tokenthrift.multimodal_lm.training.module import of_like_length
from tokenthrift.quality import read_quality
from tokenthrift.training.optim import OptimConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, two systems and data."""
    root = tmp_path_factory.mktemp("multimodal")
    save_language_model(root / "llm")
    tiny_karl().save_pretrained(root / "karl")
    tiny_dllm().save_pretrained(root / "dllm")
    write_data(root / "data")
    return root


def module(folder: Path, stage: Any, **changes: Any) -> MultimodalModule:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "language_model": str(folder / "llm"),
        "name": "../llm",
        "prefixes": tiny_config().prefixes,
        "tasks": str(folder / "data" / "tasks.json"),
        "stage": stage,
        "projector_hidden_size": 24,
        "lora": LoraConfig(rank=4, targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        "token_counts": {"image": [1, 4, 12], "audio": [2, 20]},
        "beside": str(folder / "model"),
        "optim": OptimConfig(learning_rate=1e-2, min_lr=1e-3),
    }
    return MultimodalModule(**(options | changes))


def fit(
    folder: Path, made: MultimodalModule, steps: int, resume: Path | None = None, callbacks: Any = None
) -> L.Trainer:
    data = MultimodalDataModule(str(folder / "data"), batch_size=8, others=0.5, dev_questions=12)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=callbacks is not None,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # measured once, after training
        num_sanity_val_steps=0,
    )
    trainer.fit(made, data, ckpt_path=resume, weights_only=False)
    return trainer


def test_both_stages_learn_and_the_model_answers(folder: Path, tmp_path: Path) -> None:
    aligned = module(folder, "align")
    before = {name: p.clone() for name, p in aligned.model.lm.named_parameters()}
    fit(folder, aligned, 40).save_checkpoint(tmp_path / "aligned.ckpt")
    assert all(torch.equal(p, before[name]) for name, p in aligned.model.lm.named_parameters())
    made = module(folder, "answer", start_from=str(tmp_path / "aligned.ckpt"))
    assert torch.equal(made.model.projectors["image"].up.weight, aligned.model.projectors["image"].up.weight)
    trainer = fit(folder, made, 60)
    logger = CSVLogger(tmp_path / "log")
    judge = L.Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False)
    (scores,) = judge.validate(made, MultimodalDataModule(str(folder / "data"), batch_size=6), verbose=False)
    assert scores["val/all"] >= 0.9  # a guess is right half of the time
    (texts,) = Path(logger.log_dir).glob("texts/val-answers-*.txt")
    shown = [line.split("'") for line in texts.read_text().splitlines()]
    assert len(shown) == 12, "every question of this small set"
    assert sum(row[1] == row[3] for row in shown) / len(shown) == pytest.approx(scores["val/all"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert main(["convert", "multimodal_lm", str(tmp_path / "last.ckpt"), str(folder / "model")]) == 0
    loaded = MultimodalLM.from_pretrained(folder / "model")
    examples = [Questions(folder / "data" / "test")[i] for i in range(4)]
    prompts = [prompt_of(example) for example in examples]
    assert loaded.answer(prompts, max_new_tokens=3) == made.model.eval().answer(prompts, max_new_tokens=3)
    options = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(tmp_path / "report")]
    assert main(["evaluate", "multimodal_lm", *options, "--questions", "6", "--prompts", "6"]) == 0
    curves = read_quality(folder / "model")
    assert set(curves) == {"image", "audio"}
    assert read_quality(tmp_path / "report") == curves
    assert curves["image"].command.endswith(f"--out {tmp_path / 'report'} --questions 6 --prompts 6")
    assert curves["image"].tokens == (0, 1, 2, 4, 8, 12)  # up to all that there are
    assert curves["image"].at(12) > curves["image"].at(0)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    row = report["tables"][-1]["rows"][0]
    assert {"by value", "value - equal", "value - demand", "value keeps"} <= set(row)
    assert (tmp_path / "report" / "window.png").stat().st_size > 1000


def test_a_stopped_run_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    whole = module(folder, "answer")
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(folder, whole, 4, callbacks=[keep])
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert not any(name.startswith("model.lm.") and "lora_" not in name for name in saved["state_dict"])
    again = module(folder, "answer")
    fit(folder, again, 4, resume=tmp_path / "step=2.ckpt")
    assert again.global_step == 4
    for (name, ours), wanted in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("lengths", [[], [7], [40, 9, 10, 500, 19, 18, 41]])
def test_prompts_of_like_length_run_together(lengths: list[int]) -> None:
    groups = of_like_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[i] for i in group]
        assert max(own) <= 2 * min(own)
    assert len(groups) == {0: 0, 7: 1, 500: 4}[max(lengths, default=0)]


def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_grouped(folder: Path) -> None:
    made = module(folder, "answer")
    questions = Questions(folder / "data" / "train", others=0.5)
    batch = [questions[(0, i)] for i in (0, 1, 30, 31, 2)]
    ours = made.answering(batch)
    alone = [made.answering([example]) for example in batch]
    torch.testing.assert_close(ours, torch.stack(alone).mean(), rtol=0, atol=1e-5)


def test_questions_are_the_same_every_time_and_prompts_hold_what_they_say(folder: Path) -> None:
    questions = Questions(folder / "data" / "train", others=0.5, seed=3)
    first, again = questions[(1, 5)], questions[(1, 5)]
    assert [kind for kind, _ in first.media] == [kind for kind, _ in again.media]
    assert first.seed == again.seed != questions[(2, 5)].seed
    both = [i for i in range(48) if len(questions[(0, i)].media) == 2]
    assert 10 < len(both) < 38
    prompt = prompt_of(questions[(0, both[0])])
    assert prompt[0] == "Picture:"
    assert prompt[-1] == "Question: which is it? Answer:"
    with pytest.raises(FileNotFoundError, match=r"features\.py"):
        Questions(folder)


def test_the_recipe_is_one_that_the_command_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "multimodal" / "tiny.yaml"
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert done.value.code == 0
    assert "MultimodalModule" in capsys.readouterr().out
