"""Two processes that train dLLM-ASR together: each utterance once, losses as of one process, a resume."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import training_runs
from tests.asr.tiny_dllm import write_shard, write_whisper
from tests.processes import in_this_group, together
from tokenthrift.dllm_asr import AutoregressiveModule, DllmAsrDataModule, DllmAsrModule
from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.training import data as data_file
from tokenthrift.dllm_asr.training.config import TrainingConfig
from tokenthrift.training.optim import OptimConfig
from tokenthrift.training.sampler import Epoch, ResumableBatchSampler, bucketed_epoch

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
WORDS = ["the", "lazy", "dog", "jumps", "over", "five", "six", "there"]
# Of unequal lengths, so that the two processes have unequal numbers of rows and of tokens.
TEXTS = [" ".join(WORDS[i % 8 : i % 8 + 1 + i % 4] + ["no"] * (i // 8)) for i in range(21)]
STATES = 300
STEPS = 5


def fit(
    kind: type[DllmAsrModule],
    root: Path,
    checkpoints: str,
    resume: str | None = None,
    trainer_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run: its texts, losses, validation figures and final weights."""
    torch.manual_seed(0)
    draft = DraftConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = TrainingConfig(
        whisper=str(root / "whisper"), vocab_size=120, max_position_embeddings=64, draft=draft, time_mask_prob=0.1
    )
    data = DllmAsrDataModule(str(root / "features"), max_states=STATES, seed=4)
    notes, trainer = training_runs.fit(
        kind(config, OptimConfig(learning_rate=1e-3, warmup_steps=1)),
        data,
        STEPS,
        folder=root / checkpoints,
        every=2,
        resume=resume,
        attribute="texts",
        **(trainer_options or {}),
    )
    module = trainer.lightning_module
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wer = trainer.callback_metrics["val/wer"].item()
    return {"texts": notes.seen, "losses": notes.losses, "weights": weights, "wer": wer}


def fit_in_group(kind: type[DllmAsrModule], root: Path, checkpoints: str, resume: str | None = None) -> dict[str, Any]:
    """One run as a member of a group."""
    return fit(kind, root, checkpoints, resume, in_this_group())


def global_batches(lengths: list[int], max_states: int, *, seed: int, bucket: int) -> ResumableBatchSampler:
    """For one process, the batches that two share."""

    def epoch_of(epoch: int, world: int) -> Epoch:
        two = bucketed_epoch(lengths, max_states, 2, random.Random(f"{seed}-{epoch}"), bucket)
        return Epoch(two.order, two.ends[1::2], 1)

    return ResumableBatchSampler(epoch_of)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_whisper(folder / "whisper")
    shard = write_shard(folder / "features" / "0000-slt-0.safetensors", TEXTS)
    drafts = [[[word, 0.9, 0.1 * i, 0.1 * i + 0.1] for i, word in enumerate(text.split())] for text in TEXTS]
    shard.with_suffix(".drafts.json").write_text(json.dumps(drafts))
    write_shard(folder / "features" / "dev-0000-slt.safetensors", TEXTS[:3])
    return folder


@pytest.mark.parametrize("kind", [DllmAsrModule, AutoregressiveModule])
def test_two_processes_train_as_one_and_resume(
    kind: type[DllmAsrModule], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = kind.__name__
    for folder in ("whole", "rest"):
        (tmp_path / folder).mkdir()
    whole = together(tmp_path / "whole", fit_in_group, kind, root, f"{name}-two")
    steps = [[*one, *two] for one, two in zip(*(member["texts"] for member in whole), strict=True)]
    assert len(steps) == STEPS
    assert any(len(one) != len(two) for one, two in zip(*(member["texts"] for member in whole), strict=True))

    monkeypatch.setattr(data_file, "bucketed_batches", global_batches)
    alone = fit(kind, root, f"{name}-one")
    assert steps == alone["texts"]
    means = torch.tensor([member["losses"] for member in whole], dtype=torch.float64).mean(0)
    # Later losses follow from the gradients before, so equal losses are equal gradients.
    torch.testing.assert_close(means, torch.tensor(alone["losses"], dtype=torch.float64), rtol=1e-3, atol=0)
    assert whole[0]["wer"] == pytest.approx(whole[1]["wer"])
    assert whole[0]["wer"] == pytest.approx(alone["wer"], abs=1e-6), "over all recordings, not a mean of two means"
    monkeypatch.undo()

    # Killed in the middle of the first epoch: what a process has not done by then, it does on resuming.
    checkpoint = str(root / f"{name}-two" / "step=2.ckpt")
    rest = together(tmp_path / "rest", fit_in_group, kind, root, f"{name}-rest", checkpoint)
    for before, after in zip(whole, rest, strict=True):
        assert after["texts"] == before["texts"][2:]
        assert after["losses"] == before["losses"][2:]
        for weight, tensor in before["weights"].items():
            assert torch.equal(after["weights"][weight], tensor)


def seen_in_group(root: Path) -> list[list[str]]:
    """The texts of three epochs of this process."""
    data = DllmAsrDataModule(str(root / "features"), max_states=STATES)
    data.setup("fit")
    loader = data.train_dataloader()
    return [[text for batch in loader for text in batch.texts] for _ in range(3)]


def test_processes_share_every_epoch_out(root: Path, tmp_path: Path) -> None:
    one, two = together(tmp_path, seen_in_group, root)
    for mine, theirs in zip(one, two, strict=True):
        assert Counter(mine + theirs) == Counter(TEXTS)
        assert mine
        assert theirs
    assert one[0] != one[1]
