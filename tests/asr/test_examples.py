"""Training responses: they say the text, hide what they hide as MASK, and come from the seed alone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_dllm import vocabulary
from tokenthrift.dllm_asr.corruption import Corrupted
from tokenthrift.dllm_asr.examples import Times, drafted, padded, responses

few = settings(deadline=None, max_examples=60)
WORDS = ["the", "dog", "jumps", "over", "don't", "unheard", "a", "lazy"]
Case = tuple[list[str], list[float], list[Times | None]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Texts, durations, and of some texts when each word is spoken."""
    texts = draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), min_size=1, max_size=5))
    seconds = [draw(st.floats(0.02, 12)) for _ in texts]
    times: list[Times | None] = []
    for text, length in zip(texts, seconds, strict=True):
        share = length / max(1, len(text.split()))
        spoken = [(i * share, (i + 0.8) * share) for i in range(len(text.split()))]
        times.append(spoken if draw(st.booleans()) else None)
    return texts, seconds, times


def make(case: Case, seed: int, **options: Any) -> tuple[Tensor, Tensor, Corrupted, Tensor]:
    return responses(*case, vocabulary(), random.Random(seed), **options)


def spoken(ids: list[int]) -> list[int]:
    """Ids without those that write nothing."""
    vocab = vocabulary()
    return [i for i in ids if i not in (vocab.delete_id, vocab.eos_id)]


def tokens(text: str) -> list[int]:
    return [t for w in text.split() for t in vocabulary().word(w)]


@given(cases(), st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.3]))
@few
def test_responses(case: Case, seed: int, draft_share: float, substitution: float) -> None:
    vocab = vocabulary()
    targets, mask, seen, windows = make(case, seed, draft_share=draft_share, substitution=substitution)
    rows = len(case[0])
    assert targets.shape == mask.shape == seen.ids.shape == seen.masked.shape
    assert windows.shape == (*targets.shape, 2)
    # The targets say the text, then end; rows are right-padded.
    for row, text in zip(range(rows), case[0], strict=True):
        ids = targets[row][mask[row]].tolist()
        assert spoken(ids) == tokens(text)
        assert ids[-1] == vocab.eos_id
        first = ids.index(vocab.eos_id)
        assert set(ids[first:]) == {vocab.eos_id}
    assert (mask.int().diff(dim=1) <= 0).all()
    # Hidden slots and no others hold MASK; visible ones hold the truth or a substitute that could be meant.
    assert torch.equal(seen.ids == vocab.mask_id, seen.masked)
    assert not (seen.masked & ~mask).any()
    visible = mask & ~seen.masked
    assert torch.equal(seen.substituted, visible & (seen.ids != targets))
    assert substitution or not seen.substituted.any()
    special = torch.tensor([vocab.mask_id, vocab.eos_id, vocab.delete_id, vocab.start_id])
    assert not torch.isin(seen.ids[seen.substituted], special).any()
    assert ((seen.rates > 0) & (seen.rates <= 1)).all()
    # Windows are open or go forward; the end of one is never before its beginning by more than the jitter of times.
    assert not windows.isnan().any()
    assert (windows[..., 1] - windows[..., 0] > -0.13).all()
    assert (windows[~mask] == torch.tensor([0.0, math.inf])).all()


@given(cases(), st.integers(0, 999))
@few
def test_the_same_seed_gives_the_same_responses(case: Case, seed: int) -> None:
    state, python = torch.random.get_rng_state(), random.getstate()
    first, second = make(case, seed), make(case, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
    for a, b in zip((first[0], first[1], first[3]), (second[0], second[1], second[3]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first[2].ids, second[2].ids)
    assert torch.equal(first[2].rates, second[2].rates)


def test_other_seeds_give_other_responses() -> None:
    case: Case = (["the dog jumps over the lazy dog"] * 4, [3.0] * 4, [None] * 4)
    assert len({make(case, seed)[2].ids.numpy().tobytes() for seed in range(8)}) == 8


@given(cases(), st.integers(0, 999), st.integers(1, 12))
@few
def test_no_response_is_longer_than_the_positions(case: Case, seed: int, positions: int) -> None:
    targets, mask, seen, _ = make(case, seed, positions=positions)
    assert 1 <= targets.shape[1] <= positions
    for row, text in enumerate(case[0]):
        said = spoken(targets[row][mask[row]].tolist())
        assert said == tokens(text)[: len(said)]
    assert ((seen.rates > 0) & (seen.rates <= 1)).all()


@given(st.lists(st.sampled_from(WORDS), max_size=8), st.integers(0, 999))
@few
def test_a_draft_hides_whole_words_and_has_spare_slots(words: list[str], seed: int) -> None:
    vocab = vocabulary()
    row = drafted(words, None, vocab, random.Random(seed))
    assert len(row.ids) == len(row.hidden) == len(row.windows)
    assert 1 <= row.ids.count(vocab.eos_id) <= 4
    assert all(hidden for i, hidden in zip(row.ids, row.hidden, strict=True) if i in (vocab.eos_id, vocab.delete_id))
    # A word is hidden as a whole or not at all.
    position = 0
    kept = [(i, hidden) for i, hidden in zip(row.ids, row.hidden, strict=True) if i != vocab.delete_id]
    for word in words:
        size = len(vocab.word(word))
        part = kept[position : position + size]
        assert [i for i, _ in part] == list(vocab.word(word))
        assert len({hidden for _, hidden in part}) == 1
        position += size


def test_drafts_hide_any_share() -> None:
    words = WORDS * 3
    shares = [
        sum(row.hidden) / len(row.hidden)
        for row in (drafted(words, None, vocabulary(), random.Random(s)) for s in range(60))
    ]
    assert min(shares) < 0.2
    assert max(shares) > 0.8


@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_padded_texts_end_a_little_too_late_or_as_the_duration_suggests(seconds: float) -> None:
    vocab = vocabulary()
    spare = {
        len(padded(["the", "dog"], vocab, random.Random(seed), seconds)) - len(tokens("the dog")) for seed in range(60)
    }
    guess = max(1, round(5 * seconds) + 2 - len(tokens("the dog")))
    assert spare == {*range(1, 9), guess}
