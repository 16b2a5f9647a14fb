"""The sampler against traces of the published ones (dLLM-ASR's released loop, Fast-dLLM's threshold loop and rule).

The traces were recorded on a small stub model in float64, rebuilt here from the arrays stored with them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.asr.dllm_asr.plain_denoise import sampled
from tokenthrift.backbones.llada import llama_from_llada
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.backbones.samplers import TokenIds
from tokenthrift.backbones.samplers.rules import by_threshold
from tokenthrift.backbones.samplers.scores import Scoring, score
from tokenthrift.budget import DecodeBudget

MASK, EOS = 47, 46


class Mixer:
    """The stub model: each position mixes its neighbours' embeddings with weights that fall with distance."""

    def __init__(self, file: Path) -> None:
        self.arrays = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del rows
        assert mask.all()
        a = self.arrays
        prompt = a["prompt_embeds"] if "prompt_embeds" in a else a["m_E"][a["prompt"]]
        e = torch.cat([prompt, a["m_E"][ids]], 1)
        positions = torch.arange(e.shape[1], dtype=torch.float64)
        weights = torch.exp(-(positions[:, None] - positions).abs() / a["m_tau"]).fill_diagonal_(0.0)
        mixed = weights / weights.sum(1, keepdim=True) @ e
        logits = torch.tanh(e + a["m_P"][: e.shape[1]] + a["m_ctx"] * mixed) @ a["m_U"] + a["m_b"]
        self.inputs.append(torch.cat([a["prompt"], ids], 1))
        self.logits.append(logits)
        return logits[:, prompt.shape[1] :]


def all_masked(length: int) -> tuple[Tensor, Tensor]:
    return torch.full((1, length), MASK), torch.ones(1, length, dtype=torch.bool)


@pytest.mark.parametrize("case", ["dllmasr_prune", "dllmasr_noprune"])
def test_released_loop_of_dllm_asr(reference: Path, case: str) -> None:
    folder = reference / "dllm"
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["cases"] if entry["name"] == case)
    stub = Mixer(folder / f"{case}.npz")
    budget = DecodeBudget(confidence_threshold=entry["params"]["threshold"])
    ids, mask = all_masked(entry["params"]["gen_length"])

    result = sampled(stub, ids, mask, mask_id=MASK, eos_id=EOS, budget=budget, prune="first")

    assert result.forwards == entry["nfe"]
    assert [logits.shape[1] for logits in stub.logits] == entry["lengths"]
    for call, logits in enumerate(stub.logits):
        confidence, token = logits[0].softmax(-1).max(-1)
        width = len(token)
        assert token.tolist() == stub.arrays["argmax"][call, :width].tolist()
        torch.testing.assert_close(confidence, stub.arrays["conf"][call, :width], rtol=0, atol=1e-12)
    response = result.ids[0, : int(result.lengths[0])].tolist()
    assert stub.arrays["prompt"][0].tolist() + response == stub.arrays["out"][0].tolist()


def test_pruning_every_round_also_cuts_at_a_late_eos(reference: Path) -> None:
    stub = Mixer(reference / "dllm" / "dllmasr_prune.npz")
    ids, mask = all_masked(64)
    budget = DecodeBudget()
    released = sampled(stub, ids, mask, mask_id=MASK, eos_id=EOS, budget=budget, prune="first")
    ours = sampled(stub, ids, mask, mask_id=MASK, eos_id=EOS, budget=budget)
    assert ours.forwards < released.forwards
    assert int(ours.lengths[0]) < int(released.lengths[0])
    assert EOS not in ours.ids[0, : int(ours.lengths[0])]


def test_threshold_loop_of_fast_dllm(reference: Path) -> None:
    stub = Mixer(reference / "dllm" / "fast_thr09_block1.npz")
    budget = DecodeBudget(confidence_threshold=0.9)
    ids, mask = all_masked(32)
    result = sampled(stub, ids, mask, mask_id=MASK, eos_id=EOS, budget=budget, prune="never")
    assert torch.stack(stub.inputs).tolist() == stub.arrays["x_in"].tolist()
    assert result.ids[0].tolist() == stub.arrays["out"][0, 5:].tolist()


def test_threshold_rule_of_fast_dllm(reference: Path) -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(reference / "dllm" / "fast_commit_rules.npz").items()}
    logits, open_slots = arrays["logits"], arrays["mask"]
    for threshold in (0.5, 0.8, 0.9, 0.95):
        chosen = by_threshold(arrays["conf"].masked_fill(~open_slots, 2.0), open_slots, threshold)
        assert torch.equal(chosen, arrays[f"thr{threshold}"])

    token, confidence = score(logits[open_slots], TokenIds(MASK, EOS), Scoring())
    upstream = arrays["x0"][open_slots]
    speaks = upstream != MASK
    assert not speaks.all()
    assert torch.equal(token[speaks], upstream[speaks])
    # Ours never answers MASK and shares its probability among the others.
    without_mask = 1 - logits[open_slots].double().softmax(-1)[:, MASK]
    torch.testing.assert_close((confidence * without_mask)[speaks], arrays["conf"][open_slots][speaks])
    assert (token != MASK).all()


def test_fast_dllm_on_tiny_llada_through_the_llama_backbone(reference: Path) -> None:
    folder = reference / "dllm"
    config = json.loads((folder / "tiny_llada.json").read_text())
    arrays = np.load(folder / "tiny_llada.npz")
    lm = llama_from_llada(config["config"], load_file(folder / "tiny_llada.safetensors"))
    mask_id, eos_id = 159, 158
    backbone = PrefixBackbone(lm, mask_id, prompt=arrays["prompt"][0].tolist())
    context = backbone.context(torch.zeros(1, 0, 64), torch.zeros(1, 0, dtype=torch.bool))
    canvas = torch.full((1, 32), mask_id)
    forwards = 0
    # The run was made in four blocks of 8 slots, later blocks visible as MASK.
    for block in range(0, 32, 8):
        here = slice(block, block + 8)

        def predict(ids: Tensor, mask: Tensor, rows: Tensor, here: slice = here) -> Tensor:
            del mask, rows
            canvas[:, here] = ids
            logits: Tensor = backbone(canvas, torch.ones_like(canvas, dtype=torch.bool), context)
            return logits[:, here]

        slots = torch.ones(1, 8, dtype=torch.bool)
        budget = DecodeBudget(confidence_threshold=0.5)
        result = sampled(predict, canvas[:, here], slots, mask_id=mask_id, eos_id=eos_id, budget=budget, prune="never")
        canvas[:, here] = result.ids
        forwards += result.forwards
    assert forwards == config["nfe"]["generate_thr0.5"]
    assert canvas[0].tolist() == arrays["generate_thr0.5"][0, 9:].tolist()
