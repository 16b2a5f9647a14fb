"""Samplers under models, canvases and options of no sense: they end, decide every slot, or say what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.multimodal.backbones.samplers.test_any_model import SAMPLERS, canvas_of, model
from tokenthrift.backbones.samplers import (
    Canvas,
    DaedalSampler,
    DreamSampler,
    EntropyBoundSampler,
    FastDllmSampler,
    LladaSampler,
    PriorGuidedSampler,
    Sampler,
    TokenIds,
    Trace,
    sample,
    sample_ragged,
)

TOKENS = TokenIds(mask=0, eos=3)


def masked(rows: int, width: int) -> Canvas:
    return Canvas.after_prompt(torch.ones(rows, 1, dtype=torch.int64), width, TOKENS.mask)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "llada released"])
def test_a_model_that_allows_nothing_but_mask_ends(name: str) -> None:
    """MASK has the lowest id here, which is what `argmax` gives where no token is possible."""
    calls = 0

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        del mask, rows
        calls += 1
        assert calls < 100, "it does not end"
        logits = torch.full((*ids.shape, 5), -torch.inf)
        logits[..., TOKENS.mask] = 1.0
        return logits

    done = sample(predict, masked(2, 6), SAMPLERS[name], TOKENS)
    assert not (done.ids[done.mask] == TOKENS.mask).any()


def test_a_vocabulary_of_mask_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="besides MASK"):
        sample(lambda ids, *_: torch.zeros(*ids.shape, 1), masked(1, 2), FastDllmSampler(), TOKENS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_rows_cost_no_call(name: str) -> None:
    canvas = canvas_of(0, [8])
    nothing = Canvas(canvas.ids[:0], canvas.mask[:0], canvas.start)
    done = sample(model(0, ""), nothing, SAMPLERS[name], TokenIds(8, 7))
    assert (done.forwards, done.responses(), done.text_slots()) == (0, [], [])


NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    "make",
    [
        lambda: LladaSampler(temperature=NAN),
        lambda: LladaSampler(guidance=INFINITY),
        lambda: FastDllmSampler(threshold=NAN),
        lambda: FastDllmSampler(threshold=INFINITY, compat="released"),
        lambda: FastDllmSampler(factor=NAN),
        lambda: PriorGuidedSampler(threshold=1.5),
        lambda: PriorGuidedSampler(threshold=0.0, compat="released"),
        lambda: EntropyBoundSampler(bound=NAN),
        lambda: DreamSampler(order_temperature=NAN),
        lambda: DaedalSampler(temperature=NAN),
        lambda: DaedalSampler(high=1.5),
        lambda: DaedalSampler(low=NAN),
        lambda: DaedalSampler(eos_threshold=-1.0),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Sampler]) -> None:
    with pytest.raises(ValueError, match="must|finite"):
        make()


def test_a_published_threshold_above_one_commits_one_slot_a_call() -> None:
    canvas, ids = canvas_of(1, [8]), TokenIds(8, 7)
    single = sample(model(1, ""), canvas, FastDllmSampler(rule="single", block_length=4), ids)
    for sampler in (
        FastDllmSampler(threshold=1.5, compat="released", mask_token="renormalize", block_length=4),
        PriorGuidedSampler(threshold=1.5, compat="released", prune="never", mask_token="renormalize", block_length=4),
    ):
        done = sample(model(1, ""), canvas, sampler, ids)
        assert torch.equal(done.ids, single.ids)
        assert done.forwards == single.forwards == int((canvas.ids == 8).sum())


def test_the_published_noise_of_daedal_has_single_precision() -> None:
    logits = torch.zeros(1, 3, 40)
    logits[0, 0, 7] = 0.1
    trace, canvas = Trace(), Canvas.after_prompt(torch.zeros(1, 0, dtype=torch.int64), 3, TOKENS.mask)
    sampler = DaedalSampler(compat="released", grow=False, temperature=1.0)
    generator = torch.Generator().manual_seed(5)
    sample(lambda *_: logits, canvas, sampler, TOKENS, generators=generator, trace=trace, max_rounds=1)
    noise = torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(5))
    assert torch.equal(trace.after[0], (logits.exp() / -noise.log()).argmax(-1))


def test_as_published_daedal_keeps_the_precision_of_a_wide_model() -> None:
    """A confidence above the threshold by less than single precision tells is above it."""
    chance = torch.tensor(0.9 + 1e-9, dtype=torch.float64)
    logits = torch.full((1, 4, 5), float(((1 - chance) / 4).log()), dtype=torch.float64)
    logits[..., 2] = chance.log()
    done = sample(lambda *_: logits, masked(1, 3), DaedalSampler(compat="released", grow=False), TOKENS)
    assert (done.forwards, done.responses()) == (1, [[2, 2, 2]])


def test_each_utterance_may_have_a_sampler_of_its_own() -> None:
    canvases = [canvas_of(seed, [8]) for seed in (0, 1)]
    samplers = [FastDllmSampler(rule="single"), FastDllmSampler(threshold=0.1)]
    tokens = TokenIds(8, 7)
    done = sample_ragged(model(1, ""), canvases, samplers, tokens, max_rows=2)
    for one, canvas, sampler in zip(done, canvases, samplers, strict=True):
        assert torch.equal(one.ids, sample(model(1, ""), canvas, sampler, tokens).ids)
    assert done[0].forwards > done[1].forwards
    with pytest.raises(ValueError, match="2 utterances but 1 samplers"):
        sample_ragged(model(1, ""), canvases, samplers[:1], tokens, max_rows=2)


@pytest.mark.parametrize("block_length", [None, 3])
def test_a_step_of_dream_without_a_slot_costs_no_call(block_length: int | None) -> None:
    canvas, tokens = canvas_of(2, [8, 5]), TokenIds(8, 7)
    sparse = DreamSampler(steps=64, block_length=block_length)
    whole = DreamSampler(steps=64, block_length=block_length, empty_steps=True)
    done, published = (sample(model(2, ""), canvas, sampler, tokens) for sampler in (sparse, whole))
    assert torch.equal(done.ids, published.ids)
    assert done.forwards <= int((canvas.ids == 8).sum(1).max()) < 64 <= published.forwards
