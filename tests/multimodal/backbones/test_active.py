"""The active set with halo: exact where it says so, an approximation elsewhere, and less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenthrift.backbones.active import ActiveBackbone
from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.backbones.samplers import Canvas, PriorGuidedSampler, Sampled, TokenIds, sample

MASK, EOS, WIDTH, SLOTS = 39, 38, 32, 14
TOKENS = TokenIds(MASK, EOS)
SAMPLER = PriorGuidedSampler(threshold=0.35, verify_threshold=0.02)


def backbone_of(model_type: str, **options: Any) -> PrefixBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = language_model(
            {
                "model_type": model_type,
                "vocab_size": 40,
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        )
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.35)
    return PrefixBackbone(lm, MASK, prompt=[1, 2], **options).double().eval()


def batch() -> tuple[Tensor, Tensor, Canvas]:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 5, WIDTH, generator=generator, dtype=torch.float64)
    there = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    ids = torch.randint(3, 30, (3, SLOTS), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = MASK
    return memory, there, Canvas(ids, torch.arange(SLOTS) < torch.tensor([SLOTS, 9, 12])[:, None])


@torch.no_grad()
def decoded(backbone: PrefixBackbone, **options: Any) -> Sampled:
    memory, there, canvas = batch()
    hints = torch.full_like(canvas.ids, MASK)
    hints[:, ::3] = 7
    active = ActiveBackbone(backbone, backbone.context(memory, there), hints=hints, **options)
    return sample(active, canvas, SAMPLER, TOKENS)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("attention", "exact"), [("full", False), ("prefix", True)])
def test_it_is_the_whole_pass_where_it_says_so(attention: Any, exact: bool, shifted: bool) -> None:
    backbone = backbone_of("llama", attention=attention, shifted=shifted)
    memory, there, canvas = batch()
    with torch.no_grad():
        context = backbone.context(memory, there)
        hints = torch.full_like(canvas.ids, MASK)
        hints[:, ::3] = 7

        def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
            logits: Tensor = backbone(ids, mask, context.select(rows), hints=hints[rows, : ids.shape[1]])
            return logits

        expected = sample(predict, canvas, SAMPLER, TOKENS)
    assert expected.forwards > 2, "the first round is the whole pass anyway"
    same: list[dict[str, Any]] = [{"halo": None}, {"halo": 0, "refresh": 1}]
    if exact:
        same.append({"halo": SLOTS})
    for options in same:
        done = decoded(backbone, **options)
        assert torch.equal(done.ids, expected.ids)
        assert torch.equal(done.rounds, expected.rounds)
        torch.testing.assert_close(done.confidence, expected.confidence, equal_nan=True, rtol=0, atol=1e-10)


def test_a_narrow_halo_reads_less_and_still_decides_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of("qwen2", attention="prefix")
    read, run = [], backbone.run

    def counted(embeddings: Tensor, positions: Tensor, exists: Tensor, *more: Any) -> Any:
        read.append(int(exists.sum()))
        return run(embeddings, positions, exists, *more)

    monkeypatch.setattr(backbone, "run", counted)

    def slots_of_a_round(**options: Any) -> float:
        read.clear()
        done = decoded(backbone, **options)
        assert not (done.ids[done.mask] == MASK).any()
        return sum(read[1:]) / done.forwards  # the first call reads memory and prompt

    narrow, often, whole = [slots_of_a_round(**o) for o in ({"halo": 1}, {"halo": 1, "refresh": 2}, {"halo": None})]
    assert narrow < often < whole


def test_what_keeps_no_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="bert keeps no keys"):
        decoded(backbone_of("bert"), halo=2)
    with pytest.raises(ValueError, match="must not be negative"):
        decoded(backbone_of("llama"), halo=-1)
