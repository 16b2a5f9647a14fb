"""Cached states: batches within their limit, every utterance once an epoch, and a resume at the very next batch."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.asr.tiny_dllm import spoken_states, write_shard
from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.training.data import Batch, BatchOrder, CachedStates, DllmAsrDataModule, Utterance, collate

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
TEXTS = [f"{'the lazy dog ' * n}jumps" for n in range(1, 8)] + ["a", "over it", "fox"] * 3
few = settings(deadline=None, max_examples=25)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    write_shard(tmp_path / "0000-slt-0.safetensors", TEXTS[:9])
    write_shard(tmp_path / "0001-rms-0.safetensors", TEXTS[9:])
    write_shard(tmp_path / "dev-0000-slt.safetensors", ["held out", "never trained on", "third"])
    return tmp_path


def epoch(order: BatchOrder) -> list[list[int]]:
    return list(order)


@given(LENGTHS, st.integers(60, 400), st.integers(0, 9))
@few
def test_batches_keep_to_the_limit_and_hold_every_utterance_once(lengths: list[int], limit: int, seed: int) -> None:
    batches = BatchOrder(lengths, limit, seed)._batches(3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert max(lengths[i] for i in batch) * len(batch) <= limit


def test_an_utterance_longer_than_the_limit_is_a_batch_of_its_own() -> None:
    assert sorted(BatchOrder([500, 3], 100, 0)) == [[0], [1]]


@given(LENGTHS, st.integers(60, 400), st.integers(0, 9))
@few
def test_the_order_depends_on_seed_and_epoch_alone(lengths: list[int], limit: int, seed: int) -> None:
    one, two = BatchOrder(lengths, limit, seed), BatchOrder(lengths, limit, seed)
    assert [epoch(one), epoch(one)] == [epoch(two), epoch(two)]


def test_epochs_and_seeds_differ() -> None:
    lengths = [*range(1, 60)]
    order = BatchOrder(lengths, 100, 0)
    first, second = epoch(order), epoch(order)
    assert first != second
    assert first != epoch(BatchOrder(lengths, 100, 1))


def test_batches_hold_utterances_of_like_length() -> None:
    lengths = [*range(1, 200)]
    waste = [
        1 - sum(b) / (max(b) * len(b)) for b in ([lengths[i] for i in batch] for batch in BatchOrder(lengths, 800, 0))
    ]
    assert sum(waste) / len(waste) < 0.15


def test_collating_pads_with_zeros() -> None:
    draft = [DraftWord("ab", 0.9, 0.0, 0.1)]
    items = [Utterance(spoken_states(text).half(), text, had) for text, had in (("ab", draft), ("abc", []))]
    batch = collate(items)
    assert batch.states.dtype == torch.float32
    assert batch.states.shape[:2] == (2, 15)
    assert batch.lengths.tolist() == [10, 15]
    assert not batch.states[0, 10:].any()
    assert (batch.texts, batch.drafts) == (["ab", "abc"], [draft, []])
    assert torch.equal(batch.states[1], items[1].states.float())
    assert collate(items).seed == batch.seed
    moved = batch.to("meta")
    assert moved.states.is_meta
    assert moved.lengths.is_meta
    assert moved.seed == batch.seed


def test_shards_give_their_utterances(features: Path) -> None:
    shards = sorted(features.glob("0*.safetensors"))
    heard = [["fogs", 0.5, 0.1, 0.2]]
    shards[1].with_suffix(".drafts.json").write_text(json.dumps([heard, *[[]] * (len(TEXTS) - 10)]))
    data = CachedStates(shards)
    assert len(data) == len(TEXTS)
    assert [data[i].text for i in range(len(data))] == TEXTS
    assert data.lengths == [5 * len(text) for text in TEXTS] == [len(data[i].states) for i in range(len(data))]
    assert torch.equal(data[10].states, spoken_states(TEXTS[10], seed=1).half())
    assert [data[i].draft for i in (0, 9, 10)] == [[], [DraftWord("fogs", 0.5, 0.1, 0.2)], []]
    assert [CachedStates(shards, limit=4)[i].text for i in range(4)] == TEXTS[:4]
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


def sequence(features: Path, consumed: int, batches: int) -> list[list[str]]:
    """Batches after so many, of a loader that is begun again at each of its ends, as a trainer does."""
    data = DllmAsrDataModule(str(features), max_states=400)
    data.load_state_dict({"consumed": consumed})
    data.setup("fit")
    texts: list[list[str]] = []
    loader = data.train_dataloader()
    while len(texts) < batches:
        texts += [batch.texts for batch in loader]
    return texts[:batches]


def test_resuming_after_several_epochs(tmp_path: Path) -> None:
    lengths = random.Random(0)
    texts = [f"{i:03d}{'a' * lengths.randint(1, 30)}" for i in range(120)]
    write_shard(tmp_path / "0000-slt-0.safetensors", texts)
    order = BatchOrder([5 * len(text) for text in texts], 400, 0)
    counts = [len(order._batches(i)) for i in range(4)]
    assert len(set(counts)) == 1
    assert order._batches(0) != order._batches(1)
    whole = sequence(tmp_path, 0, sum(counts))
    seen = Counter(text for batch in whole for text in batch)
    assert set(seen.values()) == {4}
    assert len(seen) == len(texts)
    for consumed in (1, counts[0], sum(counts[:2]), sum(counts[:3]) + 1):
        assert sequence(tmp_path, consumed, 5) == whole[consumed : consumed + 5]


def test_every_epoch_of_a_run_has_every_utterance_once(features: Path, tmp_path: Path) -> None:
    order = BatchOrder(CachedStates(sorted(features.glob("0*.safetensors"))).lengths, 400, 2)
    seen = train(features, 4 * len(order), tmp_path / "run", max_states=400, seed=2)
    texts = [text for batch in seen for text in batch]
    for i in range(3):
        assert sorted(texts[i * len(TEXTS) : (i + 1) * len(TEXTS)]) == sorted(TEXTS), f"epoch {i}"


def test_no_shards_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training shards.*features\.py"):
        DllmAsrDataModule(str(tmp_path)).setup("fit")


def test_recordings_need_the_module_that_encodes_them(features: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a DllmAsrModule"):
        DllmAsrDataModule(str(features), dev_recordings=str(tmp_path)).setup("fit")
