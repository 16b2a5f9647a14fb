"""Training responses: they say the text, hide what they hide as MASK, and come from the seed alone."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.tiny_dllm import vocabulary
from tokenthrift.dllm_asr.canvas import build_canvas, num_open_slots
from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.training.config import ExampleConfig
from tokenthrift.dllm_asr.training.examples import (
    ResponseBatch,
    align_words,
    build_batch,
    from_draft,
    partially_decoded,
    with_eos_padding,
)

few = settings(deadline=None, max_examples=25)
WORDS = ["the", "dog", "jumps", "over", "don't", "unheard", "a", "lazy"]
MISHEARD = ["dogg", "jum", "thedog", "lays", "o", "dont"]
Case = tuple[list[str], list[float], list[list[DraftWord]]]


def timed(words: list[str], confidence: list[float]) -> list[DraftWord]:
    return [DraftWord(w, c, 0.5 * i, 0.5 * i + 0.4) for i, (w, c) in enumerate(zip(words, confidence, strict=True))]


@st.composite
def drafts(draw: st.DrawFn, words: list[str]) -> list[DraftWord]:
    """A draft that has dropped, changed and invented words."""
    written = []
    for word in words:
        match draw(st.integers(0, 5)):
            case 0:
                pass
            case 1:
                written.append(draw(st.sampled_from(MISHEARD)))
            case 2:
                written += [word, draw(st.sampled_from(MISHEARD))]
            case _:
                written.append(word)
    return timed(written, [draw(st.floats(0, 1)) for _ in written])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Texts, durations, and what the CTC head wrote, nothing included."""
    spoken = draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=8), min_size=1, max_size=4))
    seconds = [draw(st.floats(0.02, 12)) for _ in spoken]
    return [" ".join(words) for words in spoken], seconds, [draw(drafts(words)) for words in spoken]


def make(case: Case, seed: int, max_slots: int = 248, **options: float) -> ResponseBatch:
    seeds = [1000 * seed + row for row in range(len(case[0]))]
    return build_batch(
        *case, seeds, vocabulary(), ExampleConfig(**{"partially_decoded_prob": 0.0, **options}), max_slots=max_slots
    )


def written(ids: list[int]) -> list[int]:
    """Ids without those that write nothing."""
    vocab = vocabulary()
    return [i for i in ids if i not in (vocab.delete_id, vocab.eos_id)]


def tokens(text: str) -> list[int]:
    return [t for w in text.split() for t in vocabulary().word(w)]


@given(cases(), st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.3]))
@few
def test_responses(case: Case, seed: int, from_draft_prob: float, substitute_prob: float) -> None:
    vocab = vocabulary()
    made = make(case, seed, from_draft_prob=from_draft_prob, substitute_prob=substitute_prob)
    targets, mask, seen = made.targets, made.mask, made.corrupted
    assert targets.shape == mask.shape == seen.ids.shape == seen.masked.shape == made.hints.shape
    assert made.windows.shape == (*targets.shape, 2)
    # The targets say the text, then end; rows are right-padded.
    for row, text in zip(range(len(targets)), case[0], strict=True):
        ids = targets[row][mask[row]].tolist()
        assert written(ids) == tokens(text)
        first = ids.index(vocab.eos_id)
        assert set(ids[first:]) == {vocab.eos_id}
    assert (mask.int().diff(dim=1) <= 0).all()
    # Hidden slots and no others hold MASK, and at least the end is hidden in a draft.
    assert torch.equal(seen.ids == vocab.mask_id, seen.masked)
    assert not (seen.masked & ~mask).any()
    wrong = mask & ~seen.masked & (seen.ids != targets)
    assert from_draft_prob or substitute_prob or not wrong.any()
    special = torch.tensor([vocab.mask_id, vocab.eos_id, vocab.delete_id, vocab.start_id])
    assert not torch.isin(seen.ids[wrong], special).any()
    assert ((seen.rates > 0) & (seen.rates <= 1)).all()
    # Only open slots have hints; windows are where the slots may be spoken, anywhere where that is not known.
    assert (made.hints[~seen.masked] == vocab.mask_id).all()
    assert not torch.isin(made.hints, special[1:]).any()
    assert (made.windows[..., 1] >= made.windows[..., 0]).all()
    assert (made.windows[~mask] == torch.tensor([0.0, math.inf])).all()
    if not from_draft_prob:
        assert (made.windows == torch.tensor([0.0, math.inf])).all()
        assert (made.hints == vocab.mask_id).all()


@given(cases(), st.integers(0, 999))
@few
def test_the_same_seeds_give_the_same_responses(case: Case, seed: int) -> None:
    state, python = torch.random.get_rng_state(), random.getstate()
    first, second = make(case, seed), make(case, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
    for name in ("targets", "mask", "windows", "hints"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    for name in ("ids", "masked", "rates"):
        assert torch.equal(getattr(first.corrupted, name), getattr(second.corrupted, name))


@given(cases(), st.integers(0, 999), st.data())
@few
def test_a_row_depends_on_its_own_text_draft_and_seed_alone(case: Case, seed: int, data: st.DataObject) -> None:
    """Neither on its neighbors nor on their lengths."""
    together = make(case, seed)
    row = data.draw(st.integers(0, len(case[0]) - 1))
    texts, seconds, written = [case[0][row]], [case[1][row]], [case[2][row]]
    alone = build_batch(
        texts,
        seconds,
        written,
        [1000 * seed + row],
        vocabulary(),
        ExampleConfig(partially_decoded_prob=0.0),
        max_slots=248,
    )
    slots = alone.targets.shape[1]
    assert int(together.mask[row].sum()) == slots
    for name in ("targets", "windows", "hints"):
        assert torch.equal(getattr(together, name)[row, :slots], getattr(alone, name)[0])
    assert torch.equal(together.corrupted.ids[row, :slots], alone.corrupted.ids[0])
    assert torch.equal(together.corrupted.rates[row], alone.corrupted.rates[0])


def test_texts_of_equal_length_have_masks_of_their_own() -> None:
    case: Case = (["the dog jumps over the lazy dog"] * 6, [3.0] * 6, [[]] * 6)
    made = make(case, 0, fully_masked_prob=0.0)
    masks = {tuple(row[:8].tolist()) for row in made.corrupted.masked}
    assert len(masks) > 3
    assert len(set(made.corrupted.rates.tolist())) == 6


def test_rows_are_fully_masked_and_shown_from_drafts_as_often_as_they_should() -> None:
    text = "the dog jumps over the lazy dog"
    case: Case = ([text] * 300, [3.0] * 300, [timed(text.split(), [0.9] * 7)] * 300)
    made = make(case, 0, from_draft_prob=0.4, fully_masked_prob=0.3, partially_decoded_prob=0.0, substitute_prob=0.0)
    is_draft = torch.isfinite(made.windows[:, 0, 1])
    assert 90 < int(is_draft.sum()) < 150
    whole = (made.corrupted.masked | ~made.mask).all(1) & (made.corrupted.rates == 1)
    assert 0.2 < float(whole[~is_draft].float().mean()) < 0.42


def test_visible_tokens_are_replaced_as_often_as_they_should() -> None:
    case: Case = (["the dog jumps over the lazy dog"] * 200, [3.0] * 200, [[]] * 200)
    made = make(case, 0, fully_masked_prob=0.0, substitute_prob=0.3)
    visible = made.mask & ~made.corrupted.masked
    wrong = (made.corrupted.ids != made.targets)[visible].float().mean()
    assert 0.24 < float(wrong) < 0.34


def test_other_seeds_give_other_responses() -> None:
    case: Case = (["the dog jumps over the lazy dog"] * 4, [3.0] * 4, [[]] * 4)
    assert len({make(case, seed).corrupted.ids.numpy().tobytes() for seed in range(8)}) == 8


@given(cases(), st.integers(0, 999), st.integers(1, 12))
@few
def test_no_response_is_longer_than_the_most_slots(case: Case, seed: int, most: int) -> None:
    made = make(case, seed, max_slots=most)
    assert 1 <= made.targets.shape[1] <= most
    for row, text in enumerate(case[0]):
        said = written(made.targets[row][made.mask[row]].tolist())
        assert said == tokens(text)[: len(said)]
    assert ((made.corrupted.rates > 0) & (made.corrupted.rates <= 1)).all()


@given(st.data(), st.integers(0, 999))
@few
def test_a_draft_becomes_a_canvas_as_in_decoding(data: st.DataObject, seed: int) -> None:
    vocab = vocabulary()
    words = data.draw(st.lists(st.sampled_from(WORDS), max_size=8))
    draft = data.draw(drafts(words).filter(len))
    row = from_draft(words, draft, vocab, random.Random(seed))
    canvas = row.shown
    assert {len(row.targets)} == {
        len(p) for p in (canvas.ids, canvas.confidence, canvas.times, canvas.windows, canvas.hints)
    }
    assert written(row.targets) == tokens(" ".join(words))
    # What is visible or hinted at is the draft, in its order.
    shown = [h if i == vocab.mask_id else i for i, h in zip(canvas.ids, canvas.hints, strict=True)]
    assert [i for i in shown if i != vocab.mask_id] == tokens(" ".join(w.text for w in draft))
    assert 1 <= row.targets.count(vocab.eos_id) <= 4
    assert all(i == vocab.mask_id for i, true in zip(canvas.ids, row.targets, strict=True) if true == vocab.eos_id)
    # Room for as much as a decoding that keeps every word, at least.
    spoken = len(row.targets) - row.targets.count(vocab.eos_id)
    assert spoken >= len(build_canvas(draft, vocab, threshold=0.0, extra_slots_ratio=0.3, extra_slots_at_end=0).ids)


@given(st.data(), st.integers(0, 999))
@few
def test_some_rounds_later_open_slots_hold_their_target(data: st.DataObject, seed: int) -> None:
    vocab = vocabulary()
    words = data.draw(st.lists(st.sampled_from(WORDS), max_size=8))
    before = from_draft(words, data.draw(drafts(words).filter(len)), vocab, random.Random(seed))
    later = partially_decoded(before, vocab, random.Random(seed))
    n = len(later.targets)
    assert n == len(later.shown.ids) == len(later.shown.hints) == len(later.shown.windows)
    assert later.targets == before.targets[:n]
    assert later.shown.hints == before.shown.hints[:n]
    assert set(before.targets[n:]) <= {vocab.eos_id}
    assert vocab.eos_id not in later.shown.ids
    for old, new, true in zip(before.shown.ids, later.shown.ids, later.targets, strict=False):
        assert new == old or (old == vocab.mask_id and new == true)


def test_later_rounds_of_every_kind_are_shown() -> None:
    """Nothing and everything is committed, deletions too, with the end found and not found."""
    vocab = vocabulary()
    draft = timed(["the", "lay", "dog"], [0.1, 0.1, 0.1])
    before = from_draft(["the", "lazy", "dog"], draft, vocab, random.Random(0))
    rows = [partially_decoded(before, vocab, random.Random(seed)) for seed in range(200)]
    open_slots_left = [row.shown.ids.count(vocab.mask_id) for row in rows]
    assert min(open_slots_left) == 0
    assert max(open_slots_left) == before.shown.ids.count(vocab.mask_id)
    assert any(vocab.delete_id in row.shown.ids for row in rows)
    assert 60 < sum(vocab.eos_id in row.targets for row in rows) < 140


def test_a_right_and_sure_draft_is_shown_as_it_is() -> None:
    vocab = vocabulary()
    draft = timed(["the", "lazy", "dog"], [1.0, 1.0, 1.0])
    rows = [from_draft(["the", "lazy", "dog"], draft, vocab, random.Random(seed)) for seed in range(20)]
    whole = tokens("the lazy dog")
    assert any(row.shown.ids[: len(whole)] == row.targets[: len(whole)] == whole for row in rows)


def test_a_missing_word_is_room_in_its_neighbour() -> None:
    """The draft of "the lazy dog" is "the dog": there is never a slot too few."""
    vocab = vocabulary()
    draft = timed(["the", "dog"], [1.0, 1.0])
    for seed in range(20):
        row = from_draft(["the", "lazy", "dog"], draft, vocab, random.Random(seed))
        assert written(row.targets) == tokens("the lazy dog")
        assert vocab.mask_id in row.shown.ids[: len(vocab.word("the")) + num_open_slots(len(vocab.word("dog")), 0.3)]


@pytest.mark.parametrize(
    ("draft", "words", "bounds"),
    [
        ("the lazy dog", "the lazy dog", [0, 1, 2, 3]),
        ("the lays dog", "the lazy dog", [0, 1, 2, 3]),
        ("the dog", "the lazy dog", [0, 1, 3]),
        ("the very lazy dog", "the lazy dog", [0, 1, 1, 2, 3]),
        ("thelazy dog", "the lazy dog", [0, 2, 3]),
        ("the la zy dog", "the lazy dog", None),
        ("x", "the lazy dog", [0, 3]),
        ("the lazy", "", [0, 0, 0]),
    ],
)
def test_draft_words_stand_for_true_words(draft: str, words: str, bounds: list[int] | None) -> None:
    found = align_words(draft.split(), words.split())
    if bounds is None:  # the halves of "lazy" share it in one way or the other
        assert found[:2] == [0, 1]
        assert found[3:] == [2, 3]
    else:
        assert found == bounds


@given(
    st.lists(st.sampled_from(WORDS + MISHEARD), min_size=1, max_size=8), st.lists(st.sampled_from(WORDS), max_size=8)
)
@few
def test_every_true_word_has_one_draft_word(draft: list[str], words: list[str]) -> None:
    bounds = align_words(draft, words)
    assert len(bounds) == len(draft) + 1
    assert (bounds[0], bounds[-1]) == (0, len(words))
    assert all(a <= b for a, b in pairwise(bounds))


@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_padded_texts_end_a_little_too_late_or_as_the_duration_suggests(seconds: float) -> None:
    vocab = vocabulary()
    rows = [with_eos_padding(["the", "dog"], vocab, random.Random(seed), seconds) for seed in range(60)]
    extra = {len(row) - len(tokens("the dog")) for row in rows}
    guess = max(1, round(5 * seconds) + 2 - len(tokens("the dog")))
    assert extra == {*range(1, 9), guess}
