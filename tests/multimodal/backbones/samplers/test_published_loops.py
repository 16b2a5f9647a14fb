"""`compat="released"` against plain loops of the published algorithms, for every option and for models of any kind.

The loops are written from the papers and the released scripts' behavior, one step after another; the recorded runs of
the scripts themselves are replayed in `test_published_traces`. Models may predict MASK here, which the published loops
count as decided and leave in place.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.backbones.samplers import (
    Canvas,
    FastDllmSampler,
    LladaSampler,
    PriorGuidedSampler,
    TokenIds,
    Trace,
    sample,
)
from tokenthrift.backbones.samplers.rules import quotas

VOCAB, MASK, EOS, EOT = 11, 10, 9, 8
TOKENS = TokenIds(MASK, EOS, EOT)


class Reader:
    """Scores follow from the tokens that exist, by position; says MASK often where `mask_bonus` is high."""

    def __init__(self, seed: int, mask_bonus: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64) * 2
        self.position = torch.randn(64, VOCAB, generator=generator, dtype=torch.float64) * 2
        self.mask_bonus = mask_bonus
        self.calls: list[list[list[int]]] = []

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del rows
        self.calls.append(ids.tolist())
        own = self.own[ids].masked_fill(~mask[..., None], 0.0)
        logits = own + own.sum(1, keepdim=True) / 3 + self.position[: ids.shape[1]]
        logits[..., MASK] += self.mask_bonus
        return logits


def llada(
    model: Reader,
    prompt: Tensor,
    seen: Tensor,
    sampler: LladaSampler,
    length: int,
    generator: torch.Generator,
) -> Tensor:
    """The loop of LLaDA's script."""
    assert sampler.block_length is not None
    ids = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    mask = torch.cat([seen, torch.ones(len(prompt), length, dtype=torch.bool)], 1)
    told, width = ids != MASK, prompt.shape[1]
    blocks = length // sampler.block_length
    steps = sampler.steps // blocks
    for block in range(blocks):
        first, stop = width + block * sampler.block_length, width + (block + 1) * sampler.block_length
        counts = quotas((ids[:, first:stop] == MASK).sum(1), steps)
        for step in range(steps):
            if sampler.guidance:
                free = ids.masked_fill(told, MASK)
                both = model(torch.cat([ids, free]), torch.cat([mask, mask]), torch.zeros(0))
                one, other = both.chunk(2)
                logits = other + (sampler.guidance + 1) * (one - other)
            else:
                logits = model(ids, mask, torch.zeros(0))
            if sampler.logits_eos_inf:
                logits[..., EOS] = -torch.inf
            noisy = logits
            if sampler.temperature:
                noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
                noisy = logits.exp() / (-noise.log()) ** sampler.temperature
            token = noisy.argmax(-1)
            if sampler.confidence_eos_eot_inf:
                noisy[..., EOS] = logits[..., EOT] = -torch.inf
            sure = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
            if sampler.remasking == "random":
                sure = torch.rand(sure.shape, generator=generator).double()
            sure[:, stop:] = -torch.inf
            sure = sure.masked_fill(ids != MASK, -torch.inf)
            token = torch.where(ids == MASK, token, ids)
            for row in range(len(ids)):
                chosen = sure[row].argsort(descending=True, stable=True)[: int(counts[row, step])]
                ids[row, chosen] = token[row, chosen]
    return ids


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    padding=st.integers(0, 2),
    block_length=st.sampled_from([2, 4, 8]),
    steps_per_block=st.integers(1, 11),
    guidance=st.sampled_from([0.0, 1.5]),
    temperature=st.sampled_from([0.0, 0.7]),
    random=st.booleans(),
    eos=st.sampled_from(["", "logits", "confidence"]),
    mask_bonus=st.sampled_from([-9.0, 0.0, 4.0]),
)
def test_llada(
    seed: int,
    padding: int,
    block_length: int,
    steps_per_block: int,
    guidance: float,
    temperature: float,
    random: bool,
    eos: str,
    mask_bonus: float,
) -> None:
    sampler = LladaSampler(
        compat="released",
        steps=steps_per_block * (8 // block_length),
        block_length=block_length,
        guidance=guidance,
        temperature=temperature,
        remasking="random" if random else "low_confidence",
        logits_eos_inf=eos == "logits",
        confidence_eos_eot_inf=eos == "confidence",
    )
    prompt = torch.randint(0, 8, (2, 3), generator=torch.Generator().manual_seed(seed))
    seen = torch.ones_like(prompt, dtype=torch.bool)
    seen[0, :padding] = False
    expected, found = Reader(seed, mask_bonus), Reader(seed, mask_bonus)
    ids = llada(expected, prompt, seen, sampler, 8, torch.Generator().manual_seed(5))
    canvas = Canvas.after_prompt(prompt, 8, MASK, seen)
    done = sample(found, canvas, sampler, TOKENS, generators=torch.Generator().manual_seed(5))
    assert found.calls == expected.calls
    assert done.ids.tolist() == ids.tolist()


def fast(model: Reader, prompt: Tensor, sampler: FastDllmSampler, length: int) -> Tensor | None:
    """The loop of Fast-dLLM's script without a cache; None where it would never end."""
    assert sampler.block_length is not None
    ids = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    blocks = length // sampler.block_length
    for block in range(blocks):
        first = prompt.shape[1] + block * sampler.block_length
        stop = first + sampler.block_length
        counts = quotas((ids[:, first:stop] == MASK).sum(1), sampler.steps // blocks)
        for step in range(100):
            before = ids.clone()
            logits = model(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(0))
            sure, token = logits.softmax(-1).max(-1)
            undecided = ids == MASK
            undecided[:, stop:] = False
            for row in range(len(ids)):
                order = sure[row].masked_fill(~undecided[row], -torch.inf).argsort(descending=True, stable=True)
                ranked = order[: int(undecided[row].sum())]
                if sampler.rule == "threshold":
                    chosen = [s for n, s in enumerate(ranked.tolist()) if n == 0 or sure[row, s] >= sampler.threshold]
                elif sampler.rule == "quota":
                    chosen = ranked[: int(counts[row, step]) if step < counts.shape[1] else 0].tolist()
                else:
                    fine = 0
                    while fine < len(ranked) and (
                        fine == 0 or sure[row, ranked[fine]] >= 1 - sampler.factor / (fine + 2)
                    ):
                        fine += 1
                    chosen = ranked[: len(ranked) if fine == len(ranked) - 1 else fine].tolist()
                ids[row, chosen] = token[row, chosen]
            if not bool((ids[:, first:stop] == MASK).any()):
                break
            if torch.equal(before, ids) and (sampler.rule != "quota" or step >= counts.shape[1]):
                return None
    return ids


@pytest.mark.parametrize("rule", ["threshold", "factor", "quota"])
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    block_length=st.sampled_from([2, 4, 8]),
    threshold=st.sampled_from([0.3, 0.9, 1.0, 1.5]),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    steps_per_block=st.integers(1, 8),
    mask_bonus=st.sampled_from([-9.0, 1.0]),
)
def test_fast_dllm(
    rule: str, seed: int, block_length: int, threshold: float, factor: float, steps_per_block: int, mask_bonus: float
) -> None:
    blocks = 8 // block_length
    steps = min(steps_per_block, block_length) * blocks
    options = {"rule": rule, "block_length": block_length, "threshold": threshold, "factor": factor, "steps": steps}
    sampler = FastDllmSampler(compat="released", **options)  # type: ignore[arg-type]
    prompt = torch.randint(0, 8, (2 if rule == "quota" else 1, 3), generator=torch.Generator().manual_seed(seed))
    expected, found, trace = Reader(seed, mask_bonus), Reader(seed, mask_bonus), Trace()
    ids = fast(expected, prompt, sampler, 8)
    done = sample(found, Canvas.after_prompt(prompt, 8, MASK), sampler, TOKENS, trace=trace)
    assert len(trace.calls) <= 40, "none loops for ever"
    if ids is None:
        return
    assert found.calls == expected.calls
    assert done.ids.tolist() == ids.tolist()


def prior_guided(model: Reader, sampler: PriorGuidedSampler, length: int) -> list[int] | None:
    """The loop of dLLM-ASR's script after its prompt; None where it would never end."""
    assert sampler.block_length is not None
    ids, calls = torch.full((1, length), MASK), 0
    for first in range(0, length, sampler.block_length):
        stop = first + sampler.block_length
        while True:
            before = ids.clone()
            logits = model(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(0))
            calls += 1
            sure, token = logits.softmax(-1).max(-1)
            undecided = ids == MASK
            undecided[:, stop:] = False
            if bool(undecided.any()):
                chosen = undecided & (sure >= sampler.threshold)
                chosen[0, sure.masked_fill(~undecided, -1.0).argmax()] = True
                ids = torch.where(chosen, token, ids)
            if calls == 1 and EOS in ids[0].tolist():
                ids = ids[:, : ids[0].tolist().index(EOS)]
            if not bool((ids[:, first:stop] == MASK).any()):
                break
            if torch.equal(before, ids):
                return None
    response: list[int] = ids[0].tolist()
    return response


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    block_length=st.sampled_from([2, 4, 8]),
    threshold=st.sampled_from([0.3, 0.9, 1.5]),
    mask_bonus=st.sampled_from([-9.0, 1.0]),
)
def test_dllm_asr(seed: int, block_length: int, threshold: float, mask_bonus: float) -> None:
    """A pruned run still pays a call for every block that pruning emptied, down to no slot at all."""
    sampler = PriorGuidedSampler(compat="released", threshold=threshold, block_length=block_length)
    expected, found = Reader(seed, mask_bonus), Reader(seed, mask_bonus)
    ids = prior_guided(expected, sampler, 8)
    canvas = Canvas.after_prompt(torch.zeros(1, 0, dtype=torch.int64), 8, MASK)
    done = sample(found, canvas, sampler, TOKENS)
    assert len(found.calls) <= 40, "none loops for ever"
    if ids is not None:
        assert found.calls == expected.calls
        assert done.responses() == [ids]
