"""Cached keys and values: exact where the mask allows it, the published approximation elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenthrift.backbones.cached import CachedBackbone
from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.llada import llama_from_llada
from tokenthrift.backbones.masked import Context
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.backbones.samplers import Canvas, FastDllmSampler, TokenIds, Trace, sample

VOCAB, WIDTH, MASK, EOS = 40, 32, 39, 38
TOKENS = TokenIds(MASK, EOS)


def backbone_of(attention: Any, *, shifted: bool = False, prompt: tuple[int, ...] = ()) -> PrefixBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "max_position_embeddings": 96}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        lm = language_model({"model_type": "qwen2", **sizes, **heads})
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    backbone = PrefixBackbone(lm, MASK, prompt=prompt, shifted=shifted, attention=attention, block_size=4)
    return backbone.train(False)


def memory_of(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    memory = torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    return memory.masked_fill(~mask[..., None], torch.nan), mask


def nothing(rows: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, 0, WIDTH), torch.zeros(rows, 0, dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("attention", ["prefix", "blocks"])
def test_a_prefix_computed_once_says_what_a_pass_over_everything_says(attention: Any, shifted: bool) -> None:
    lengths, slots = [9, 3, 0, 8], [4, 12, 5, 1]
    backbone = backbone_of(attention, shifted=shifted)
    memory, memory_mask = memory_of(lengths)
    ids = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < torch.tensor(slots)[:, None]
    cached = backbone(ids, mask, backbone.context(memory, memory_mask))
    assert not cached[mask].isnan().any()
    model: Any = backbone.lm
    for row, (n, s) in enumerate(zip(lengths, slots, strict=True)):
        embedded = torch.cat([memory[row, :n], model.get_input_embeddings()(ids[row, :s])])[None]
        at = torch.arange(n + s)
        seen = (at[None] < n) | (at[:, None] >= n) if attention == "prefix" else at[None] // 4 <= at[:, None] // 4
        logits = model(inputs_embeds=embedded, attention_mask=seen[None, None]).logits[0]
        expected = logits[(torch.arange(n, n + s) - int(shifted)).clamp(min=0)]
        torch.testing.assert_close(cached[row, :s, :MASK], expected[:, :MASK], rtol=0, atol=1e-5)
        alone = backbone.context(memory[row : row + 1, :n], memory_mask[row : row + 1, :n])
        one = backbone(ids[row : row + 1, :s], mask[row : row + 1, :s], alone)
        torch.testing.assert_close(cached[row : row + 1, :s], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["prefix", "blocks"])
def test_gradients_pass_through_the_cached_prefix(attention: Any) -> None:
    backbone = backbone_of(attention, prompt=(3, 4))
    memory, mask = memory_of([6, 9])
    memory = memory.requires_grad_()
    ids = torch.full((2, 5), MASK)
    logits = backbone(ids, torch.ones_like(ids, dtype=torch.bool), backbone.context(memory, mask))
    torch.autograd.backward(logits[..., :MASK].square().mean())
    assert memory.grad is not None
    assert (memory.grad[mask].abs().amax(-1) > 0).all()
    assert (memory.grad[~mask] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "prefix", "blocks"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_window_says_what_the_full_pass_says_while_nothing_else_changed(attention: Any, shifted: bool) -> None:
    backbone = backbone_of(attention, shifted=shifted)
    cached = CachedBackbone(backbone, backbone.context(*memory_of([5, 8, 4])))
    rows = torch.tensor([2, 0])
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(12) < torch.tensor([[12], [9]])
    whole = cached.refresh(ids, mask, rows)
    torch.testing.assert_close(whole[mask], cached(ids, mask, rows)[mask], rtol=0, atol=1e-5)
    for start, stop in ((0, 4), (4, 8), (3, 12)):
        part, seen = cached.within(ids[:, start:stop], rows, start), mask[:, start:stop]
        torch.testing.assert_close(part[seen], whole[:, start:stop][seen], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_over_blocks_makes_the_cache_exact(shifted: bool) -> None:
    backbone = backbone_of("blocks", shifted=shifted)
    cached = CachedBackbone(backbone, backbone.context(*nothing(2)))
    prompt = torch.randint(0, MASK, (2, 6), generator=torch.Generator().manual_seed(3))
    canvas = Canvas.after_prompt(prompt, 15, MASK)
    plain = FastDllmSampler(rule="single", block_length=4, aligned=True)
    exact = FastDllmSampler(rule="single", block_length=4, aligned=True, cache="dual")
    free, windows = Trace(), Trace()
    expected = sample(cached, canvas, plain, TOKENS, trace=free)
    done = sample(cached, canvas, exact, TOKENS, trace=windows)
    assert done.responses() == expected.responses()
    torch.testing.assert_close(done.confidence, expected.confidence, rtol=0, atol=1e-6, equal_nan=True)
    read = [call.ids.shape[1] for call in windows.calls]
    assert len(read) == len(free.calls)
    assert read.count(21) == 5  # one full pass for each block, the first and the last of them shorter
    assert max(width for width in read if width != 21) == 4


@torch.no_grad()
def test_errors_say_what_is_wrong() -> None:
    backbone = backbone_of("full")
    cached = CachedBackbone(backbone, backbone.context(*nothing(1)))
    left = torch.tensor([[False, True, True]])
    with pytest.raises(ValueError, match="padded on the right"):
        cached.refresh(torch.zeros(1, 3, dtype=torch.int64), left, torch.tensor([0]))
    with pytest.raises(ValueError, match="guidance"):
        FastDllmSampler(cache="dual", guidance=1.0)
    with pytest.raises(ValueError, match="block_size"):
        PrefixBackbone(backbone.lm, MASK, block_size=0)


def empty_context(backbone: PrefixBackbone) -> Context:
    return backbone.context(torch.zeros(1, 0, 64), torch.zeros(1, 0, dtype=torch.bool))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", ["quota", "threshold"])
def test_published_fast_dllm_on_a_tiny_llada(reference: Path, cache: Any, rule: Any) -> None:
    folder = reference / "dllm"
    stored = json.loads((folder / "tiny_llada.json").read_text())
    arrays = np.load(folder / "tiny_llada.npz")
    lm = llama_from_llada(stored["config"], load_file(folder / "tiny_llada.safetensors"))
    backbone = PrefixBackbone(lm, 159)
    sampler = FastDllmSampler(
        rule=rule, threshold=0.5, steps=16, block_length=8, cache=cache, compat="released", mask_token="renormalize"
    )
    canvas = Canvas.after_prompt(torch.from_numpy(arrays["prompt"]), 32, 159)
    done = sample(CachedBackbone(backbone, empty_context(backbone)), canvas, sampler, TokenIds(159, 158))
    name = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}[cache]
    name += "_quota" if rule == "quota" else "_thr0.5"
    assert done.forwards == stored["nfe"][name]
    assert done.ids.tolist() == arrays[name].tolist()
