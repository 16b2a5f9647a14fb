"""Whisper's decoder: with its causal mask what transformers computes, without it a masked-diffusion backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tokenthrift.backbones.whisper_decoder import (
    WhisperDecoder,
    WhisperDecoderBackbone,
    decoder_weights,
    window_bias,
)

VOCAB, WIDTH, POSITIONS = 40, 32, 24
START, MASK = 38, 39


@pytest.fixture(scope="module")
def reference() -> Any:
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_mel_bins=8,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_target_positions=POSITIONS,
        decoder_start_token_id=START,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config).eval()
        for parameter in model.model.decoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def decoder_of(reference: Any, keep: list[int] | None = None, extra: int = 0) -> WhisperDecoder:
    keep = list(range(VOCAB)) if keep is None else keep
    decoder = WhisperDecoder(len(keep) + extra, WIDTH, 2, 4, 48, POSITIONS)
    decoder.load_state_dict(decoder_weights(reference.state_dict(), keep, extra, POSITIONS))
    return decoder.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_of(memory: Tensor) -> Tensor:
    return torch.ones(memory.shape[:2], dtype=torch.bool)


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


@torch.no_grad()
def test_with_a_causal_mask_it_equals_transformers(reference: Any) -> None:
    decoder, memory = decoder_of(reference), draw(2, 9, WIDTH)
    ids = torch.tensor([[START, 5, 6, 7, 5], [START, 9, 1, 0, 3]])
    expected = reference(encoder_outputs=(memory,), decoder_input_ids=ids).logits
    hidden, _ = decoder(ids, causal(5), decoder.context(memory, all_of(memory)))
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_a_trimmed_vocabulary_gives_the_same_scores_to_what_it_keeps(reference: Any) -> None:
    keep, memory = [5, 38, 7, 1, 30], draw(1, 9, WIDTH)
    whole, part = decoder_of(reference), decoder_of(reference, keep, extra=2)
    assert part.embed_tokens.num_embeddings == len(keep) + 2
    torch.testing.assert_close(part.embed_tokens.weight[-1], whole.embed_tokens.weight[keep].mean(0))
    old, new = torch.tensor([[38, 7, 5, 30]]), torch.tensor([[1, 2, 0, 4]])
    expected, _ = whole(old, causal(4), whole.context(memory, all_of(memory)))
    hidden, _ = part(new, causal(4), part.context(memory, all_of(memory)))
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(part.logits(hidden)[..., : len(keep)], whole.logits(expected)[..., keep])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4], [3, 1, 2]])
def test_cached_pieces_equal_one_causal_pass(reference: Any, pieces: list[int]) -> None:
    decoder, memory = decoder_of(reference), draw(2, 9, WIDTH)
    context = decoder.context(memory, torch.arange(9) < torch.tensor([[9], [4]]))
    ids = torch.tensor([[START, 5, 6, 7, 5, 2], [START, 9, 1, 0, 3, 3]])
    expected, _ = decoder(ids, causal(6), context)
    past, got = None, []
    for piece in ids.split(pieces, 1):
        seen = 0 if past is None else past[0][0].shape[2]
        mask = causal(seen + piece.shape[1])[seen:]
        hidden, past = decoder(piece, mask, context, past)
        got.append(hidden)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-5)


def backbone_of(reference: Any, start: tuple[int, ...] = (START,), future: float = 0.0) -> WhisperDecoderBackbone:
    """A backbone whose heads weigh later slots by `exp(10 * future)`."""
    backbone = WhisperDecoderBackbone(decoder_of(reference), MASK, start)
    torch.nn.init.constant_(backbone.future, future)
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("start", [(START,), (START, 4)])
@pytest.mark.parametrize("future", [0.0, -100.0])
def test_a_slot_is_predicted_from_the_position_before_it(reference: Any, start: tuple[int, ...], future: float) -> None:
    """With the future open by the decoder that sees everything, with the future closed by the causal one."""
    backbone, memory = backbone_of(reference, start, future), draw(1, 9, WIDTH)
    ids = torch.tensor([[5, MASK, 7]])
    context = backbone.context(memory, all_of(memory))
    text = torch.cat([torch.tensor([start]), ids], 1)
    hidden, _ = backbone.decoder(text, causal(text.shape[1]) if future else None, context)
    got = backbone(ids, torch.ones_like(ids, dtype=torch.bool), context)
    expected = backbone.decoder.logits(hidden[:, len(start) - 1 : -1])
    torch.testing.assert_close(got[..., :MASK], expected[..., :MASK])
    assert got[..., MASK].tolist() == [[float("-inf")] * 3]


def test_the_future_starts_faint_and_can_be_learnt(reference: Any) -> None:
    memory, ids = draw(1, 9, WIDTH), torch.tensor([[5, MASK, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    fresh = WhisperDecoderBackbone(decoder_of(reference), MASK, (START,))
    closed, opened = (backbone_of(reference, future=f) for f in (-100.0, 0.0))
    here, past, whole = (b(ids, mask, b.context(memory, all_of(memory)))[..., :MASK] for b in (fresh, closed, opened))
    assert 0 < (here - past).abs().mean() < 0.2 * (whole - past).abs().mean()
    here.square().sum().backward()
    assert fresh.future.grad is not None
    assert fresh.future.grad.all(), "every head of every layer has its own"


@torch.no_grad()
def test_every_slot_sees_every_other_and_the_memory(reference: Any) -> None:
    backbone, memory = backbone_of(reference), draw(1, 9, WIDTH)
    ids, mask = torch.tensor([[5, MASK, 7, 2]]), torch.ones(1, 4, dtype=torch.bool)
    plain = backbone(ids, mask, backbone.context(memory, all_of(memory)))[0, :, :MASK]
    for slot in range(4):
        other = ids.clone()
        other[0, slot] = 11
        moved = backbone(other, mask, backbone.context(memory, all_of(memory)))[0, :, :MASK] - plain
        assert (moved.abs().amax(-1) > 1e-4).all(), f"slot {slot}"
    memory[0, 8] += 1.0
    moved = backbone(ids, mask, backbone.context(memory, all_of(memory)))[0, :, :MASK] - plain
    assert (moved.abs().amax(-1) > 1e-4).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=2, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone(sizes: list[tuple[int, int]], seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = WhisperDecoderBackbone(WhisperDecoder(VOCAB, WIDTH, 2, 4, 48, POSITIONS), MASK, (START,)).double()
    lengths, slots = torch.tensor(sizes).T
    memory = draw(len(sizes), int(lengths.max()), WIDTH, seed=seed).double()
    memory_mask = torch.arange(memory.shape[1]) < lengths[:, None]
    memory = memory.masked_fill(~memory_mask[..., None], torch.nan)
    mask = torch.arange(int(slots.max())) < slots[:, None]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, mask.shape, generator=generator).masked_fill(mask & (draw(*mask.shape) > 0), MASK)
    hints = torch.randint(0, VOCAB, mask.shape, generator=generator)
    windows = torch.rand(*mask.shape, 2, generator=generator).cumsum(-1) * 5
    windows = windows.masked_fill((~mask)[..., None], torch.inf)
    context = backbone.context(memory, memory_mask)
    for near, had in ((None, None), (windows, hints)):
        together = backbone(ids, mask, context, near, had)
        assert not together[mask].isnan().any()
        for row, (n, s) in enumerate(sizes):
            at = slice(row, row + 1)
            cut = [None if part is None else part[at, :s] for part in (near, had)]
            alone = backbone(ids[at, :s], mask[at, :s], backbone.context(memory[at, :n], memory_mask[at, :n]), *cut)
            torch.testing.assert_close(together[at, :s], alone, rtol=0, atol=1e-9)
            whole = [None if part is None else part[at] for part in (near, had)]
            chosen = backbone(ids[at], mask[at], context.select(torch.tensor([row])), *whole)
            torch.testing.assert_close(chosen[:, :s], together[at, :s], rtol=0, atol=1e-9)


@torch.no_grad()
def test_open_windows_and_no_hints_change_nothing(reference: Any) -> None:
    backbone, memory = backbone_of(reference, (START, 4)), draw(1, 9, WIDTH)
    ids, mask = torch.tensor([[5, MASK, 7, MASK]]), torch.ones(1, 4, dtype=torch.bool)
    context = backbone.context(memory, all_of(memory))
    anywhere = torch.tensor([0.0, torch.inf]).expand(1, 4, 2)
    plain = backbone(ids, mask, context)
    torch.testing.assert_close(backbone(ids, mask, context, anywhere, torch.full_like(ids, MASK)), plain)
    # A hint counts in open slots only.
    hints = torch.tensor([[9, MASK, 9, MASK]])
    torch.testing.assert_close(backbone(ids, mask, context, None, hints), plain)
    hints[0, 1] = 9
    assert not torch.allclose(backbone(ids, mask, context, None, hints)[..., :MASK], plain[..., :MASK])


@torch.no_grad()
def test_a_window_keeps_a_slot_from_what_is_far_away(reference: Any) -> None:
    backbone, memory = backbone_of(reference), draw(1, 200, WIDTH)
    ids, mask = torch.tensor([[MASK]]), torch.ones(1, 1, dtype=torch.bool)
    near = torch.tensor([[[20.0, 30.0]]])
    moved = {}
    for place in (25, 190):
        other = memory.clone()
        other[0, place] += 5.0
        before, after = (backbone(ids, mask, backbone.context(m, all_of(m)), near)[..., :MASK] for m in (memory, other))
        moved[place] = (after - before).abs().max()
    assert moved[190] < 1e-4 < 1e-2 < moved[25]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300).map(lambda n: n / 10), st.integers(0, 300).map(lambda n: n / 10), st.integers(1, 60))
def test_bias_of_a_window(first: float, length: float, size: int) -> None:
    (bias,) = window_bias(torch.tensor([[[first, first + length]]]), size)[0]
    at = torch.arange(size)
    inside = (at >= first) & (at <= first + length)
    assert (bias[inside] == 0).all()
    assert (bias[~inside] < 0).all()
    assert (bias >= -30).all()
    before, after = bias[at < first], bias[at > first + length]
    assert (before.diff() >= 0).all()
    assert (after.diff() <= 0).all()


def test_text_longer_than_the_positions_is_refused(reference: Any) -> None:
    backbone, memory = backbone_of(reference), draw(1, 3, WIDTH)
    ids = torch.zeros(1, POSITIONS, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"text takes {POSITIONS + 1} positions, the model has {POSITIONS}"):
        backbone(ids, torch.ones_like(ids, dtype=torch.bool), backbone.context(memory, all_of(memory)))
