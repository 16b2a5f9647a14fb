"""Every sampler with compat="released" against the recorded runs of the published one, call by call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.multimodal.backbones.samplers.stub_models import EOS, MASK, Mixer, Scripted, case
from tokenthrift.backbones.samplers import (
    Canvas,
    DaedalSampler,
    FastDllmSampler,
    LladaSampler,
    PriorGuidedSampler,
    Sampler,
    TokenIds,
    Trace,
    sample,
)
from tokenthrift.backbones.samplers.rules import quotas

TOKENS = TokenIds(MASK, EOS)


def assert_calls(trace: Trace, recorded: torch.Tensor, masks: torch.Tensor | None = None) -> None:
    """What the model read is what the published loop gave it, call by call; -1 fills what a call did not have."""
    assert len(trace.calls) == len(recorded)
    for number, (call, expected) in enumerate(zip(trace.calls, recorded, strict=True)):
        width = call.ids.shape[1]
        assert call.ids.tolist() == expected[:, :width].tolist(), f"call {number}"
        assert (expected[:, width:] == -1).all(), f"call {number} is shorter"
        if masks is not None:
            assert call.mask.int().tolist() == masks[number, :, :width].tolist(), f"call {number}"


@pytest.mark.parametrize("name", ["llada_full", "llada_semi_ar", "llada_leftpad", "fast_thr09_block1"])
def test_fixed_canvas(reference: Path, name: str) -> None:
    entry, arrays = case(reference / "dllm", name)
    params, trace = entry["params"], Trace()
    canvas = Canvas.after_prompt(arrays["prompt"], params["gen_length"], MASK, arrays.get("attention_mask"))
    sampler: Sampler = LladaSampler(compat="released", steps=params["steps"], block_length=params["block_length"])
    if name.startswith("fast"):
        sampler = FastDllmSampler(compat="released", threshold=params["threshold"], block_length=params["block_length"])
    done = sample(Mixer(arrays), canvas, sampler, TOKENS, trace=trace)
    assert_calls(trace, arrays["x_in"])
    assert done.ids.tolist() == arrays["out"].tolist()
    assert done.forwards == entry.get("nfe", entry.get("calls"))


@pytest.mark.parametrize("name", ["daedal_stage1_only", "daedal_insert"])
def test_growing_canvas(reference: Path, name: str) -> None:
    entry, arrays = case(reference / "dllm", name)
    params, trace = entry["params"], Trace()
    sampler = DaedalSampler(
        compat="released",
        max_length=params["max_gen_length"],
        block_length=params["block_length"],
        expansion=params["expansion_factor"],
        eos_window=params["eos_check_tokens"],
    )
    canvas = Canvas.after_prompt(arrays["prompt"], params["initial_gen_length"], MASK)
    done = sample(Scripted(arrays), canvas, sampler, TOKENS, trace=trace)
    assert_calls(trace, arrays["x_in"], arrays["am_in"])
    expected = [[token for token in row if token >= 0] for row in arrays["out"].tolist()]
    prompts = arrays["prompt"].tolist()
    assert [[*prompt, *response] for prompt, response in zip(prompts, done.responses(), strict=True)] == expected


@pytest.mark.parametrize("name", ["dllmasr_prune", "dllmasr_noprune"])
def test_pruned_canvas(reference: Path, name: str) -> None:
    entry, arrays = case(reference / "dllm", name)
    params, trace = entry["params"], Trace()
    sampler = PriorGuidedSampler(compat="released", threshold=params["threshold"], block_length=params["block_length"])
    canvas = Canvas.after_prompt(torch.zeros(1, 0, dtype=torch.int64), params["gen_length"], MASK)
    done = sample(Mixer(arrays), canvas, sampler, TOKENS, trace=trace)
    prompt = arrays["prompt"].shape[1]
    assert [prompt + call.ids.shape[1] for call in trace.calls] == entry["lengths"]
    for call, (logits, ids) in enumerate(zip(trace.logits, trace.after, strict=True)):
        confidence, token = logits[0].softmax(-1).max(-1)
        here = slice(prompt, prompt + len(token))
        assert token.tolist() == arrays["argmax"][call, here].tolist()
        torch.testing.assert_close(confidence, arrays["conf"][call, here], rtol=0, atol=1e-12)
        assert ids.shape == (1, params["gen_length"])
    assert arrays["prompt"][0].tolist() + done.responses()[0] == arrays["out"][0].tolist()


def test_quota_table(reference: Path) -> None:
    table = json.loads((reference / "dllm" / "num_transfer_tokens.json").read_text())
    assert len(table) > 100
    for row in table:
        assert quotas(torch.tensor([row["masked"]]), row["steps"])[0].tolist() == row["counts"], row
