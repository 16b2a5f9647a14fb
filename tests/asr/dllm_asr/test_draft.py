"""The draft: greedy CTC to words, and the canvas that a draft leaves to the denoiser."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_dllm import vocabulary
from tokenthrift.dllm_asr.canvas import build_canvas, num_open_slots, slot_windows
from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.draft import (
    CHARACTERS,
    SECONDS,
    DraftHead,
    DraftWord,
    character_ids,
    ctc_loss,
    draft_words,
)

few = settings(deadline=None, max_examples=25)


def frames(text: str, sure: dict[int, float] | None = None) -> Tensor:
    """Log-probabilities whose best character is that of the text at each frame; `_` is the blank."""
    ids = [0 if c == "_" else CHARACTERS.index(c) + 1 for c in text]
    p = torch.full((len(ids), len(CHARACTERS) + 1), 0.1 / len(CHARACTERS))
    p[range(len(ids)), ids] = 0.9
    for frame, confidence in (sure or {}).items():
        p[frame] = (1 - confidence) / len(CHARACTERS)
        p[frame, ids[frame]] = confidence
    return p.log()


def found(text: str) -> list[str]:
    return [w.text for w in draft_words(frames(text))]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("__cc_aat___", ["cat"]),
        ("hheel_lloo", ["hello"]),
        ("heelllo", ["helo"]),  # without a blank between them two letters are one
        ("a_ab_b", ["aabb"]),
        ("on  _  e", ["on", "e"]),
        ("  two   words  ", ["two", "words"]),
        ("do_n't", ["don't"]),
        ("_____", []),
        ("   ", []),
        ("", []),
    ],
)
def test_greedy_ctc(written: str, words: list[str]) -> None:
    assert found(written) == words


def test_a_word_is_as_sure_as_its_least_sure_letter_at_its_surest_frame() -> None:
    words = draft_words(frames("ccat dog", sure={0: 0.5, 1: 0.7, 4: 0.2, 6: 0.6}))
    assert [w.text for w in words] == ["cat", "dog"]
    assert [w.confidence for w in words] == pytest.approx([0.7, 0.6])


def test_words_have_the_times_of_their_frames() -> None:
    first, second = draft_words(frames("__aa_b__ _cc_"))
    assert (first.start, first.end) == pytest.approx((2 * SECONDS, 6 * SECONDS))
    assert (second.start, second.end) == pytest.approx((10 * SECONDS, 12 * SECONDS))
    assert pytest.approx(0.02) == SECONDS


@given(st.lists(st.from_regex(r"[a-z']{1,6}", fullmatch=True), max_size=4), st.data())
@few
def test_any_path_of_a_text_gives_the_text(words: list[str], data: st.DataObject) -> None:
    """Letters may be held for some frames; a blank parts equal neighbours and may stand anywhere else."""
    text, path = " ".join(words), "_" * data.draw(st.integers(0, 2))
    for i, c in enumerate(text):
        least = int(i > 0 and text[i - 1] == c)
        path += "_" * data.draw(st.integers(least, 2)) + c * data.draw(st.integers(1, 3))
    found = draft_words(frames(path + "_" * data.draw(st.integers(0, 2))))
    assert [w.text for w in found] == words
    times = [t for w in found for t in (w.start, w.end)]
    assert times == sorted(times)
    assert not times or times[-1] <= (len(path) + 2) * SECONDS


def test_characters_have_ids_after_the_blank() -> None:
    assert character_ids(" az'") == [1, 2, 27, 28]
    with pytest.raises(ValueError, match="substring not found"):
        character_ids("A")


def test_ctc_loss_is_per_character_and_skips_what_cannot_fit() -> None:
    log_p = torch.stack([frames("_aa_b___"), frames("abcdefgh")])
    one = ctc_loss(log_p[:1], torch.tensor([8]), [character_ids("ab")])
    # The one path that has nearly all probability, over two characters.
    assert 0 < one < -8 * math.log(0.9) / 2 + 1e-6
    both = ctc_loss(log_p, torch.tensor([8, 2]), [character_ids("ab"), character_ids("abcdefgh")])
    assert both.item() == pytest.approx(one.item() / 2)
    empty = ctc_loss(log_p[:1], torch.tensor([8]), [[]])
    assert empty.isfinite()


def head() -> DraftHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DraftHead(
            DraftConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24), 12
        ).eval()


@given(st.lists(st.integers(1, 25), min_size=1, max_size=4))
@few
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone(lengths: list[int]) -> None:
    model, sizes = head(), torch.tensor(lengths)
    states = torch.randn(len(lengths), max(lengths), 12, generator=torch.Generator().manual_seed(0))
    states = states.masked_fill((torch.arange(max(lengths)) >= sizes[:, None])[..., None], torch.nan)
    log_p = model(states, sizes)
    assert log_p.shape == (len(lengths), max(lengths), 29)
    assert not log_p.isnan().any()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(lengths), max(lengths)))
    for row, n in enumerate(lengths):
        alone = model(states[row : row + 1, :n], sizes[row : row + 1])
        torch.testing.assert_close(log_p[row, :n], alone[0], rtol=0, atol=1e-5)


@st.composite
def drafts(draw: st.DrawFn) -> list[DraftWord]:
    words, now = [], 0.0
    for text in draw(st.lists(st.from_regex(r"[a-z]{1,8}('[a-z]{1,2})?", fullmatch=True), max_size=6)):
        start = now + draw(st.floats(0, 1))
        now = start + draw(st.floats(0.02, 1))
        words.append(DraftWord(text, draw(st.floats(0, 1)), start, now))
    return words


@given(drafts(), st.floats(0, 1.5), st.floats(0, 2), st.integers(0, 5))
@few
def test_canvases(words: list[DraftWord], threshold: float, ratio: float, at_end: int) -> None:
    vocab = vocabulary()
    canvas = build_canvas(words, vocab, threshold=threshold, extra_slots_ratio=ratio, extra_slots_at_end=at_end)
    sizes = {len(part) for part in (canvas.ids, canvas.confidence, canvas.times, canvas.windows, canvas.hints)}
    assert len(sizes) == 1
    # Sure words stand in order, as they are; everything else is open, with what the draft had there as a hint.
    sure = [w for w in words if w.confidence >= threshold]
    unsure = [w for w in words if w.confidence < threshold]
    assert [i for i in canvas.ids if i != vocab.mask_id] == [t for w in sure for t in vocab.word(w.text)]
    assert [i for i in canvas.hints if i != vocab.mask_id] == [t for w in unsure for t in vocab.word(w.text)]
    for token, confidence in zip(canvas.ids, canvas.confidence, strict=True):
        assert (token == vocab.mask_id and confidence == 0) or confidence >= threshold
    # There is room for what the draft says, one slot more for every unsure word, and the extra slots at the end.
    tokens = sum(len(vocab.word(w.text)) for w in words)
    extra = sum(math.floor(ratio * len(vocab.word(w.text))) + 1 for w in unsure)
    assert len(canvas.ids) == tokens + extra + at_end
    if threshold > 1:
        assert set(canvas.ids) <= {vocab.mask_id}
    # Times go forward, within the draft.
    bounds = [t for time in canvas.times for t in time]
    assert all(b >= a - 1e-9 for a, b in zip(bounds, bounds[1:], strict=False))
    assert not words or bounds == [] or (bounds[0] >= words[0].start and bounds[-1] <= words[-1].end + 1e-9)
    for (start, end), window in zip(canvas.times, canvas.windows, strict=True):
        assert window[0] - 1e-9 <= start
        assert end <= window[1] + 1e-9
    assert canvas.windows[len(canvas.ids) - at_end :] == [(words[-1].end if words else 0.0, math.inf)] * at_end


def test_a_canvas_by_hand() -> None:
    vocab = vocabulary()
    words = [DraftWord("the", 0.95, 0.0, 0.2), DraftWord("dog", 0.3, 0.3, 0.5), DraftWord("jumps", 0.6, 0.6, 1.0)]
    words.append(DraftWord("over", 0.91, 1.2, 1.4))
    canvas = build_canvas(words, vocab, threshold=0.9, extra_slots_ratio=0.5, extra_slots_at_end=1)
    the, over, dog, jumps = (list(vocab.word(w)) for w in ("the", "over", "dog", "jumps"))
    slots, more = num_open_slots(len(dog), 0.5), num_open_slots(len(jumps), 0.5)
    assert canvas.ids == [*the, *[vocab.mask_id] * (slots + more), *over, vocab.mask_id]
    assert canvas.hints[len(the) : len(the) + slots] == [*dog, *[vocab.mask_id] * (slots - len(dog))]
    span = canvas.times[len(the) : len(the) + slots]
    assert (span[0][0], span[-1][1]) == pytest.approx((0.3, 0.5))
    assert canvas.first(len(the)).ids == the
    assert canvas.first(None) == canvas


@given(st.floats(0, 20), st.floats(0.01, 5), st.integers(1, 12))
@few
def test_windows_lie_in_the_span_and_cover_it(start: float, seconds: float, slots: int) -> None:
    windows = slot_windows(start, start + seconds, slots)
    assert len(windows) == slots
    assert windows[0][0] == start
    assert windows[-1][1] == pytest.approx(start + seconds)
    for (a, b), (c, d) in zip(windows, windows[1:], strict=False):
        assert a < c < b <= d <= start + seconds + 1e-9
