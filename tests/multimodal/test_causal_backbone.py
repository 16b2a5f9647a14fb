"""A causal language model behind a prefix: rows are independent, and generation is what the logits say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tokenthrift.backbones.causal import CausalBackbone, Generation

FAMILIES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(params=list(FAMILIES), scope="module")
def backbone(request: pytest.FixtureRequest) -> CausalBackbone:
    torch.manual_seed(0)
    sizes = FAMILIES[request.param] | {"vocab_size": 50, "max_position_embeddings": 40, "bos_token_id": None}
    config = AutoConfig.for_model(request.param, **sizes, eos_token_id=None, initializer_range=0.3)
    return CausalBackbone(AutoModelForCausalLM.from_config(config).eval())


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three rows: tokens padded on the right, on the left, and not at all; texts of three lengths."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, 6, 32, generator=random)
    token_mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6]).bool()
    ids = torch.randint(0, 50, (3, 5), generator=random)
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [1] * 4 + [0]]).bool()
    return tokens.masked_fill(~token_mask[..., None], float("nan")), token_mask, ids, mask


def ids_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [list(generation.ids) for generation in generations]


def test_a_row_equals_itself_alone(backbone: CausalBackbone) -> None:
    tokens, token_mask, ids, mask = batch()
    together = backbone(tokens, token_mask, ids, mask)
    assert together.shape == (3, 5, backbone.vocab_size)
    for row in range(3):
        length = int(mask[row].sum())
        alone = backbone(
            tokens[row, token_mask[row]][None],
            torch.ones(1, int(token_mask[row].sum()), dtype=torch.bool),
            ids[row, :length][None],
            torch.ones(1, length, dtype=torch.bool),
        )
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_a_place_sees_the_prefix_and_what_is_before_it(backbone: CausalBackbone) -> None:
    tokens, token_mask, ids, mask = batch()
    logits = backbone(tokens, token_mask, ids, mask)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    after = backbone(tokens, token_mask, changed, mask)
    torch.testing.assert_close(after[0, :3], logits[0, :3])
    assert not torch.allclose(after[0, 3:], logits[0, 3:])
    tokens = tokens.clone()
    tokens[0, 0] *= -1  # a constant shift would be invisible to LayerNorm
    assert not torch.allclose(backbone(tokens, token_mask, ids, mask)[0, 0], logits[0, 0])


def test_generation_follows_the_logits(backbone: CausalBackbone) -> None:
    tokens, token_mask, _, _ = batch()
    ids = torch.tensor([[7, 8]] * 3)
    for _ in range(4):
        mask = torch.ones(3, ids.shape[1] + 1, dtype=torch.bool)
        logits = backbone(tokens, token_mask, torch.cat([ids, ids[:, :1]], 1), mask)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    expected = ids[:, 2:].tolist()
    # An id that nobody writes ends nothing; one that is written cuts the text there.
    unused = next(i for i in range(50) if all(i not in row for row in expected))
    assert ids_of(backbone.generate(tokens, token_mask, [7, 8], max_new_tokens=4, end=unused)) == expected
    end = expected[0][1]
    cut = backbone.generate(tokens, token_mask, [7, 8], max_new_tokens=4, end=end)
    assert ids_of(cut) == [row[: row.index(end)] if end in row else row for row in expected]


def test_no_prompt(backbone: CausalBackbone) -> None:
    tokens, token_mask, ids, mask = batch()
    first = backbone(tokens, token_mask, ids, mask)[:, 0].argmax(-1)
    unused = next(i for i in range(50) if i not in first.tolist())
    texts = backbone.generate(tokens, token_mask, max_new_tokens=1, end=unused)
    assert ids_of(texts) == first[:, None].tolist()


def test_what_does_not_fit(backbone: CausalBackbone) -> None:
    tokens, token_mask, ids, mask = batch()
    with pytest.raises(ValueError, match="41 positions, the model has 40"):
        backbone(
            torch.zeros(1, 36, 32), torch.ones(1, 36, dtype=torch.bool), ids[:1], torch.ones(1, 5, dtype=torch.bool)
        )
    token_mask = token_mask.clone()
    token_mask[1] = False
    with pytest.raises(ValueError, match="at least one token"):
        backbone(tokens, token_mask, ids, mask)


def test_gradients_reach_the_prefix(backbone: CausalBackbone) -> None:
    tokens, token_mask, ids, mask = batch()
    tokens = tokens.nan_to_num().requires_grad_()
    backbone(tokens, token_mask, ids, mask)[mask].logsumexp(-1).sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(-1) > 0).equal(token_mask)


def test_tokens_are_read_once_for_many_prompts(backbone: CausalBackbone) -> None:
    tokens, token_mask, _, _ = batch()
    prefix = backbone.prefill(tokens, token_mask)
    for prompt in ([7, 8], [9]):
        whole = backbone.generate(tokens, token_mask, prompt, max_new_tokens=4, end=3)
        assert ids_of(backbone.generate(prefix, prompt=prompt, max_new_tokens=4, end=3)) == ids_of(whole)
    with pytest.raises(ValueError, match="positions, the model has 40"):
        backbone.generate(prefix, prompt=[7], max_new_tokens=40, end=3)


def test_logits_are_those_of_the_language_model() -> None:
    """Some families scale or cap the scores after the last projection."""
    sizes = {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 50, "final_logit_softcapping": 0.5}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **FAMILIES["llama"], **sizes, initializer_range=0.3, pad_token_id=None)
    backbone = CausalBackbone(AutoModelForCausalLM.from_config(config).eval())
    ids = torch.tensor([[4, 5, 6]])
    tokens = torch.randn(1, 2, 32)
    everything = torch.cat([tokens, backbone.lm.get_input_embeddings()(ids)], 1)
    expected = backbone.lm(inputs_embeds=everything).logits[:, 1:4]
    assert expected.abs().max() <= 0.5
    seen = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(backbone(tokens, seen, ids, torch.ones_like(ids, dtype=torch.bool)), expected)
