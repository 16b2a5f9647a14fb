"""Cached states: batches within their limit, every utterance once an epoch, and a resume at the very next batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import soundfile
import torch
from torch import Tensor, nn

from tests.asr.tiny_dllm import speech, spoken_states, write_shard
from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.training.batch import AudioBatch, Batch, Utterance, collate
from tokenthrift.dllm_asr.training.data import CachedStates, DllmAsrDataModule

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
TEXTS = [f"{'the lazy dog ' * n}jumps" for n in range(1, 8)] + ["a", "over it", "fox"] * 3


@pytest.fixture
def features(tmp_path: Path) -> Path:
    write_shard(tmp_path / "0000-slt-0.safetensors", TEXTS[:9])
    write_shard(tmp_path / "0001-rms-0.safetensors", TEXTS[9:])
    write_shard(tmp_path / "dev-0000-slt.safetensors", ["held out", "never trained on", "third"])
    return tmp_path


def test_collating_pads_with_zeros() -> None:
    draft = [DraftWord("ab", 0.9, 0.0, 0.1)]
    items = [Utterance(spoken_states(t).half(), t, had, len(t)) for t, had in (("ab", draft), ("abc", []))]
    batch = collate(items)
    assert batch.states.dtype == torch.float32
    assert batch.states.shape[:2] == (2, 15)
    assert batch.lengths.tolist() == [10, 15]
    assert not batch.states[0, 10:].any()
    assert (batch.texts, batch.drafts) == (["ab", "abc"], [draft, []])
    assert torch.equal(batch.states[1], items[1].states.float())
    assert batch.seeds == [2, 3]
    moved = batch.to("meta")
    assert moved.states.is_meta
    assert moved.lengths.is_meta
    assert moved.seeds == batch.seeds


def test_shards_give_their_utterances(features: Path) -> None:
    shards = sorted(features.glob("0*.safetensors"))
    written = [["fogs", 0.5, 0.1, 0.2]]
    shards[1].with_suffix(".drafts.json").write_text(json.dumps([written, *[[]] * (len(TEXTS) - 10)]))
    data = CachedStates(shards)
    assert len(data) == len(TEXTS)
    assert [data[0, i].text for i in range(len(data))] == TEXTS
    assert data.lengths == [5 * len(text) for text in TEXTS] == [len(data[0, i].states) for i in range(len(data))]
    assert torch.equal(data[0, 10].states, spoken_states(TEXTS[10], seed=1).half())
    assert [data[0, i].draft for i in (0, 9, 10)] == [[], [DraftWord("fogs", 0.5, 0.1, 0.2)], []]
    assert [CachedStates(shards, limit=4)[0, i].text for i in range(4)] == TEXTS[:4]
    assert len(CachedStates(shards, limit=4)) == 4


@pytest.mark.parametrize("count", [8, 10])
def test_drafts_of_another_shard_are_refused(features: Path, count: int) -> None:
    """They would be handed to the wrong utterances, of this shard and of all after it."""
    shards = sorted(features.glob("0*.safetensors"))
    shards[0].with_suffix(".drafts.json").write_text(json.dumps([[]] * count))
    with pytest.raises(ValueError, match=rf"0000-slt-0\.drafts\.json has drafts of {count} utterances, .* has 9"):
        CachedStates(shards)


class Recorder(L.LightningModule):
    """Notes the texts of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.texts: list[list[str]] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.texts.append(batch.texts)
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(features: Path, steps: int, folder: Path, resume: Path | None = None, **options: Any) -> list[list[str]]:
    """The batches of a run up to `steps`, which leaves a checkpoint in `folder`."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    save = L.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, callbacks=[save], **quiet)
    module = Recorder()
    trainer.fit(module, datamodule=DllmAsrDataModule(str(features), **options), ckpt_path=resume)
    return module.texts


def test_training_leaves_development_shards_out(features: Path, tmp_path: Path) -> None:
    seen = train(features, 8, tmp_path / "run", max_states=10_000)
    assert sorted(text for batch in seen[:1] for text in batch) == sorted(TEXTS)
    data = DllmAsrDataModule(str(features), dev_utterances=2)
    data.setup("fit")
    (loader,) = data.val_dataloader()
    assert [text for batch in loader for text in batch.texts] == ["held out", "never trained on"]


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_run_goes_on_with_the_next_batch(features: Path, tmp_path: Path, stop: int) -> None:
    """Over the end of an epoch, too."""
    options: dict[str, Any] = {"max_states": 400, "seed": 2}
    whole = train(features, 12, tmp_path / "whole", **options)
    part = train(features, stop, tmp_path / "part", **options)
    rest = train(features, 12, tmp_path / "rest", resume=tmp_path / "part" / "last.ckpt", **options)
    assert part == whole[:stop]
    assert rest == whole[stop:]


def test_every_epoch_of_a_run_has_every_utterance_once(features: Path, tmp_path: Path) -> None:
    data = DllmAsrDataModule(str(features), max_states=400, seed=2)
    data.setup("fit")
    steps = len(data.train_dataloader())
    seen = train(features, 3 * steps, tmp_path / "run", max_states=400, seed=2)
    texts = [text for batch in seen for text in batch]
    for i in range(3):
        assert sorted(texts[i * len(TEXTS) : (i + 1) * len(TEXTS)]) == sorted(TEXTS), f"epoch {i}"
    assert seen[:steps] != seen[steps : 2 * steps]


def test_an_utterance_has_a_seed_of_its_own_in_every_epoch(features: Path) -> None:
    """Not one of its length or of the batch that it is in: a batch that comes again would be masked alike."""
    data = DllmAsrDataModule(str(features), max_states=400, seed=2)
    data.setup("fit")
    loader = data.train_dataloader()
    seeds = [seed for _ in range(3) for batch in loader for seed in batch.seeds]
    assert len(set(seeds)) == 3 * len(TEXTS)
    again = DllmAsrDataModule(str(features), max_states=900, seed=2)
    again.setup("fit")
    assert {seed for batch in again.train_dataloader() for seed in batch.seeds} == set(seeds[: len(TEXTS)])
    other = DllmAsrDataModule(str(features), max_states=400, seed=3)
    other.setup("fit")
    assert not {seed for batch in other.train_dataloader() for seed in batch.seeds} & set(seeds)


def test_no_shards_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training shards.*features\.py"):
        DllmAsrDataModule(str(tmp_path)).setup("fit")


def test_real_recordings_are_sound_that_the_module_encodes(features: Path, tmp_path: Path) -> None:
    """The data module knows no model."""
    soundfile.write(tmp_path / "clip.wav", speech(0.5).numpy(), 16_000)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"audio_filepath": "clip.wav", "text": "the dog"}) + "\n")
    data = DllmAsrDataModule(str(features), dev_recordings=str(tmp_path))
    data.setup("fit")
    (batch,) = data.val_dataloader()[1]
    assert isinstance(batch, AudioBatch)
    assert batch.texts == ["the dog"]
    assert [len(samples) for samples in batch.audio] == [8000]
    assert batch.to("meta").audio[0].is_meta
