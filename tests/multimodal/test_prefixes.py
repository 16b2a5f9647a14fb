"""Every system as the input of every backbone: the protocol, planned and used alike, causal and masked diffusion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.asr.tiny_dllm import speech
from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.asr.tiny_mtsk import lips
from tests.asr.tiny_mtsk import tiny_model as tiny_mtsk
from tests.tokenizers.karl.tiny_karl import pictures, released_config, tiny_karl
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.backbones.causal import CausalBackbone
from tokenthrift.backbones.prefix import PrefixBackbone, language_model
from tokenthrift.budget import BudgetError, ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.dllm_asr.prefix import DllmAsrPrefix
from tokenthrift.karl.prefix import KarlPrefix
from tokenthrift.mtsk.prefix import MtskPrefix
from tokenthrift.prefixes import Prefix, PrefixProjector, load_prefix
from tokenthrift.vqtoken import VQToken
from tokenthrift.vqtoken.video_lm.prefix import VideoPrefix

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class Case(NamedTuple):
    """A prefix, items for it, and what is known of them before anything runs."""

    kind: str
    build: Callable[[], Prefix]
    items: list[Tensor]
    sizes: list[ItemSize]


def clip(seed: int) -> Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


SOUNDS = [speech(0.7, seed=1), speech(1.3, seed=2)]
LIPS = [lips(0.4, 1), lips(0.8, 2)]
CASES = {
    "karl": Case("image", lambda: KarlPrefix(tiny_karl()), list(pictures(2)), [ItemSize(height=16, width=24)] * 2),
    "vqtoken": Case(
        "video",
        lambda: VideoPrefix(tiny_answerer()),
        [clip(1), clip(2)],
        [ItemSize(frames=4, height=16, width=16)] * 2,
    ),
    "mtsk": Case("audio", lambda: MtskPrefix(tiny_mtsk()), SOUNDS, [ItemSize(seconds=len(s) / 16_000) for s in SOUNDS]),
    "mtsk lips": Case("lips", lambda: MtskPrefix(tiny_mtsk(), "lips"), LIPS, [ItemSize(frames=len(f)) for f in LIPS]),
    "dllm_asr": Case(
        "audio", lambda: DllmAsrPrefix(tiny_dllm()), SOUNDS, [ItemSize(seconds=len(s) / 16_000) for s in SOUNDS]
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_what_is_planned_is_what_is_used(name: str) -> None:
    case = CASES[name]
    prefix = case.build()
    assert prefix.kind == case.kind
    native = prefix.encode(case.items)
    assert native.embeddings.shape[2] == prefix.token_size
    for budget in (None, 3, "25%", 99):
        reduced = prefix.reduce(native, budget)
        planned = prefix.plan(case.sizes, budget)
        assert [(u.native, u.used) for u in reduced.usage] == [(u.native, u.used) for u in planned]
        assert reduced.mask.sum(1).tolist() == [u.used for u in planned]
    with pytest.raises(BudgetError):
        prefix.plan(case.sizes, {"max_tokens": 2, "min_tokens": 3})
    assert prefix.reduce(native, [3, None]).mask.sum(1).tolist() == [3, planned[1].native]


@EVERY
def test_a_causal_and_a_masked_diffusion_model_read_it(name: str) -> None:
    """Each item answers differently, equals itself alone, and gives the projector a gradient."""
    case = CASES[name]
    prefix = case.build()
    torch.manual_seed(0)
    causal = CausalBackbone(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    masked = PrefixBackbone(language_model({"model_type": "llama", **SIZES}), 39).eval()
    ids, mask = torch.tensor([[5, 6, 39], [5, 6, 39]]), torch.ones(2, 3, dtype=torch.bool)

    def read(backbone: CausalBackbone | PrefixBackbone, items: list[Tensor], budget: Any) -> Tensor:
        tokens = projector(prefix.reduce(prefix.encode(items), budget))
        rows = slice(0, len(items))
        if isinstance(backbone, CausalBackbone):
            logits: Tensor = backbone(tokens.embeddings, tokens.mask, ids[rows], mask[rows])
        else:
            logits = backbone(ids[rows], mask[rows], backbone.context(tokens.embeddings, tokens.mask))
        return logits.masked_fill(logits.isinf(), 0.0)

    for backbone in (causal, masked):
        projector = PrefixProjector(prefix.token_size, 24, backbone.memory_size)
        both = read(backbone, case.items, [4, 3])
        assert not torch.allclose(both[0], both[1], atol=1e-4)
        torch.testing.assert_close(read(backbone, case.items[1:], 3)[0], both[1], atol=1e-5, rtol=0)
        both.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector.parameters())


def test_the_projector_knows_where_tokens_stand_and_never_reads_padding() -> None:
    prefix = VideoPrefix(tiny_answerer())
    native = prefix.encode([clip(1), clip(2)])
    projector = PrefixProjector(prefix.token_size, 24, 16)
    whole = projector(native).embeddings
    same = native.embeddings.clone()
    same[:, 5] = same[:, 9]
    moved = projector(type(native).from_embeddings(same)).embeddings
    assert not torch.allclose(moved[:, 5], moved[:, 9], atol=1e-5)  # one content at two positions
    reduced = prefix.reduce(native, [6, 2])
    broken = reduced.embeddings.masked_fill(~reduced.mask[..., None], torch.nan)
    out = projector(type(reduced)(**{f: getattr(reduced, f) for f in reduced.__slots__} | {"embeddings": broken}))
    assert bool(out.embeddings.isfinite().all())
    assert not bool(out.embeddings[~out.mask].any())
    assert whole.shape == (2, 64, 16)


def test_the_prefix_of_a_folder(tmp_path: Path) -> None:
    tiny_karl().save_pretrained(tmp_path / "karl")
    tiny_mtsk().save_pretrained(tmp_path / "mtsk")
    VQToken().save_pretrained(tmp_path / "vqtoken")
    karl = load_prefix(tmp_path / "karl")
    native = CASES["karl"].build().encode(CASES["karl"].items)
    torch.testing.assert_close(karl.encode(CASES["karl"].items).embeddings, native.embeddings)
    assert load_prefix(tmp_path / "mtsk", kind="lips").kind == "lips"
    planner = load_prefix(tmp_path / "mtsk", weights=False)
    assert planner.plan([ItemSize(seconds=1.0)], 7)[0].used == 7
    with pytest.raises(ConfigError, match="a VQToken gives no prefix"):
        load_prefix(tmp_path / "vqtoken")
    with pytest.raises(ValueError, match="nested"):
        KarlPrefix(tiny_karl(released_config()))
    with pytest.raises(ValueError, match="no encoder for lips"):
        DllmAsrPrefix(tiny_dllm(), "lips")  # type: ignore[arg-type]
