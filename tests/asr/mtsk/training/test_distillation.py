"""Learning from a model that reads in more tokens: what the losses are, and that they bring the two together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.asr.mtsk.training.mtsk_runs import TEXTS, fit, module_of
from tests.asr.talking import write_parts, write_states
from tokenthrift.mtsk import LlamaMtsk, MtskModule, Rates
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.distillation import DistillConfig, Teacher, distance
from tokenthrift.mtsk.training.module import module_options

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
SOUND: dict[str, Any] = {"avhubert": None, "tasks": ("asr",), "train_language_model": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("states") / "0.safetensors", TEXTS).parent


@pytest.fixture(scope="module")
def teacher(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> LlamaMtsk:
    """Trained at rates 1 and 2."""
    model = module_of(parts, **SOUND, audio_rates=(1, 2)).model
    folder = tmp_path_factory.mktemp("teacher")
    with torch.no_grad():
        for project in model.audio_proj:
            project[-1].weight.mul_(3)
    model.save_pretrained(folder)
    return LlamaMtsk.from_pretrained(folder)


def folder_of(model: LlamaMtsk) -> str:
    assert model.base_dir is not None
    return str(model.base_dir)


def some_states(model: LlamaMtsk) -> tuple[Encoded, list[list[int]]]:
    assert model.config.audio is not None
    states = torch.randn(2, 13, model.config.audio.hidden_size, generator=torch.Generator().manual_seed(3))
    return Encoded(audio=states, audio_lengths=torch.tensor([13, 8])), [model.token_ids(text) for text in TEXTS[:2]]


def test_distance_is_a_share_of_the_variance() -> None:
    taught = (torch.randn(50, 8), 100 * torch.randn(50, 8) + 7)
    assert distance(taught, taught) == 0
    means = [layer.mean(0).expand_as(layer) for layer in taught]
    torch.testing.assert_close(distance(means, taught), torch.tensor(1.0))
    torch.testing.assert_close(distance([taught[0], means[1]], taught), torch.tensor(0.5))
    assert distance([torch.ones(1, 8)], [torch.ones(1, 8)]) == 0


def test_who_is_like_the_teacher_has_the_loss_of_the_texts(teacher: LlamaMtsk) -> None:
    encoded, ids = some_states(teacher)
    one = Teacher(DistillConfig(teacher=folder_of(teacher), predictions=5.0, states=7.0), teacher)
    taught = one.taught(encoded, ids)
    count = sum(len(row) + 1 for row in ids)
    assert taught.predictions.shape == (count, teacher.config.language_model.vocab_size)
    assert len(taught.states) == teacher.config.language_model.num_hidden_layers
    finest, coarse = Rates(1, 0), Rates(2, 0)
    torch.testing.assert_close(
        one.loss(teacher, encoded, ids, finest, taught), teacher.loss(encoded, ids, finest), rtol=1e-4, atol=1e-5
    )
    own = teacher.text_states(teacher.rows(encoded, ids, coarse), coarse)
    logs = teacher.logits(teacher.rows(encoded, ids, coarse), coarse).log_softmax(-1)
    divergence = (taught.predictions.exp() * (taught.predictions - logs)).sum() / count
    expected = teacher.loss(encoded, ids, coarse) + 5 * divergence + 7 * distance(own, taught.states)
    assert divergence > 1e-4
    torch.testing.assert_close(one.loss(teacher, encoded, ids, coarse, taught), expected, rtol=1e-4, atol=1e-5)


def test_training_brings_hidden_states_nearer_to_those_of_the_teacher(
    parts: dict[str, str], states: Path, teacher: LlamaMtsk
) -> None:
    def left(module: MtskModule) -> float:
        encoded, ids = some_states(module.model)
        taught = Teacher(DistillConfig(teacher=folder_of(teacher)), module.model).taught(encoded, ids)
        rows = module.model.rows(encoded, ids, Rates(2, 0))
        return float(distance(module.model.text_states(rows, Rates(2, 0)), taught.states).detach())

    lessons = {"distillation": DistillConfig(teacher=folder_of(teacher), states=3.0)}
    found = []
    for options in ({}, lessons):
        module = module_of(parts, **SOUND, audio_rates=(2,), **options)
        begin = left(module)
        fit(module, states, 30)
        found.append(left(module) / begin)
        names = module.state_dict()
        assert not [name for name in names if "teacher" in name]
    assert found[1] < 0.9 * found[0], found


def test_a_checkpoint_is_converted_without_the_teacher(parts: dict[str, str], teacher: LlamaMtsk) -> None:
    module = module_of(parts, **SOUND, distillation=DistillConfig(teacher=folder_of(teacher)))
    saved = dict(module.hparams)
    assert saved["distillation"]["teacher"] == folder_of(teacher)
    assert MtskModule(**module_options(saved)).teacher is None


def test_a_teacher_of_another_kind_is_refused(parts: dict[str, str], teacher: LlamaMtsk, tmp_path: Path) -> None:
    lessons = DistillConfig(teacher=folder_of(teacher))
    others = write_parts(tmp_path / "others")
    sizes = LlamaConfig.from_pretrained(others["language_model"], num_hidden_layers=1)
    LlamaForCausalLM(sizes).save_pretrained(others["language_model"])
    with pytest.raises(ValueError, match="other sizes"):
        module_of(others, **SOUND, distillation=lessons)
    path = Path(parts["language_model"]) / "tokenizer.json"
    kept = path.read_text(encoding="utf-8")
    try:
        changed = Tokenizer.from_str(kept)
        changed.enable_truncation(5)
        changed.save(str(path))
        with pytest.raises(ValueError, match="another tokenizer"):
            module_of(parts, **SOUND, distillation=lessons)
    finally:
        path.write_text(kept, encoding="utf-8")
