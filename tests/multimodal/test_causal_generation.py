"""Prefill and generation: a prefix read before equals one read whole, and each row equals itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tokenthrift.backbones.causal import PrefixCache, generate, prefill
from tokenthrift.backbones.generation import Generation, greedy

WIDTH, END = 32, 3
LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
}
LIMITS = [5, 9, 7]


@pytest.fixture(params=list(FAMILIES), scope="module")
def lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = FAMILIES[request.param] | {"vocab_size": 50, "max_position_embeddings": 80, "initializer_range": 0.3}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes, **tokens))
    return model.eval()


@pytest.fixture(scope="module")
def parts() -> tuple[list[Tensor], list[Tensor]]:
    """Starts of three sequences, one of them empty, and what follows."""
    random = torch.Generator().manual_seed(1)
    return tuple([torch.randn(n, WIDTH, generator=random) for n in counts] for counts in ((3, 0, 6), (2, 5, 1)))  # type: ignore[return-value]


def close(one: list[Generation], other: list[Generation]) -> None:
    assert [row.ids for row in one] == [row.ids for row in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.probabilities, b.probabilities, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prefix_read_before_equals_one_read_whole(
    lm: PreTrainedModel, parts: tuple[list[Tensor], list[Tensor]], beams: int
) -> None:
    heads, tails = parts
    whole = [torch.cat(pair) for pair in zip(heads, tails, strict=True)]
    expected = generate(lm, whole, LIMITS, END, beams=beams)
    prefix = prefill(lm, heads)
    for _ in range(2):  # a prefix may be continued any number of times
        close(generate(lm, tails, LIMITS, END, beams=beams, prefix=prefix), expected)
    chosen = generate(lm, [tails[2], tails[0]], [7, 5], END, beams=beams, prefix=prefix.select([2, 0]))
    close(chosen, [expected[2], expected[0]])
    for i, row in enumerate(whole):
        close(generate(lm, [row], [LIMITS[i]], END, beams=beams), [expected[i]])


def test_more_beams_find_likelier_texts(lm: PreTrainedModel, parts: tuple[list[Tensor], list[Tensor]]) -> None:
    tails = parts[1]
    greedy_texts, searched = (generate(lm, tails, [6] * 3, 49, beams=beams) for beams in (1, 8))
    assert all(b.confidence >= a.confidence - 1e-6 for a, b in zip(greedy_texts, searched, strict=True))
    assert [row.ids for row in greedy_texts] != [row.ids for row in searched]


@pytest.mark.parametrize("beams", [1, 3])
def test_forbidden_tokens_are_never_written(
    lm: PreTrainedModel, parts: tuple[list[Tensor], list[Tensor]], beams: int
) -> None:
    free = generate(lm, parts[1], LIMITS, END, beams=beams)
    forbidden = sorted({token for row in free for token in row.ids})
    found = generate(lm, parts[1], LIMITS, END, beams=beams, forbidden=forbidden)
    assert not {token for row in found for token in row.ids} & set(forbidden)
    assert all(0 < chance <= 1 for row in found for chance in row.probabilities)


def test_generated_tokens_are_the_likeliest_and_carry_their_probability(lm: PreTrainedModel) -> None:
    row = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5))
    (found,) = generate(lm, [row], [6], 49)
    for n, (token, chance) in enumerate(zip(found.ids, found.probabilities, strict=True)):
        so_far = torch.cat([row, lm.get_input_embeddings()(torch.tensor(found.ids[:n], dtype=torch.int64))])
        scores = lm(inputs_embeds=so_far[None]).logits[0, -1].detach().softmax(-1)
        assert int(scores.argmax()) == token
        assert float(scores[token]) == pytest.approx(chance, abs=1e-5)


def test_the_positions_of_a_prefix_may_be_given() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA, vocab_size=50, initializer_range=0.3, pad_token_id=None)
    lm = AutoModelForCausalLM.from_config(config).eval()
    heads, tails = [torch.randn(3, WIDTH), torch.randn(2, WIDTH)], [torch.randn(1, WIDTH), torch.randn(1, WIDTH)]
    counted = prefill(lm, heads, [torch.arange(3), torch.arange(2)])
    close(generate(lm, tails, [4, 4], END, prefix=counted), generate(lm, tails, [4, 4], END, prefix=prefill(lm, heads)))
    apart = prefill(lm, heads, [torch.tensor([0, 7, 7]), torch.tensor([0, 20])])
    assert apart.next_positions.tolist() == [8, 21]
    with pytest.raises(ValueError, match="count from 0"):
        generate(lm, tails, [4, 4], END, prefix=apart, beams=2)
    moved = generate(lm, tails, [4, 4], END, prefix=apart)
    assert moved[0].probabilities != generate(lm, tails, [4, 4], END, prefix=counted)[0].probabilities


def test_a_prefix_carries_gradient_and_its_states() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA, vocab_size=50, initializer_range=0.3, pad_token_id=None)
    lm = AutoModelForCausalLM.from_config(config).eval()
    head = torch.randn(3, WIDTH, requires_grad=True)
    prefix = prefill(lm, [head, head[:1]])
    assert isinstance(prefix, PrefixCache)
    assert len(prefix) == 2
    torch.testing.assert_close(prefix.states[1, 2], lm.model(inputs_embeds=head[None, :1])[0][0, 0])
    cache = prefix.fork()
    lm(inputs_embeds=torch.randn(2, 1, WIDTH), past_key_values=cache).logits.square().sum().backward()
    assert head.grad is not None
    assert bool(head.grad.abs().sum(1).gt(0).all())
    assert cache.get_seq_length() == 4
    assert prefix.cache.get_seq_length() == 3


@pytest.mark.parametrize(("rows", "limits", "beams"), [((0, 2), (1, 1), 1), ((1, 2), (1, 0), 1), ((1, 2), (1, 1), 0)])
def test_what_cannot_be_generated(rows: tuple[int, ...], limits: tuple[int, ...], beams: int) -> None:
    config = AutoConfig.for_model("llama", **LLAMA, vocab_size=50, pad_token_id=None)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="generation needs"):
        generate(lm, [torch.zeros(n, WIDTH) for n in rows], limits, END, beams=beams)
    assert generate(lm, [], [], END) == []


def test_finished_rows_leave_the_batch() -> None:
    """The decoder may be any function; row 0 ends at once, row 1 at its limit, row 2 with the end."""
    script = {0: [END], 1: [5, 6, 7, 8], 2: [5, END]}
    rows = [0, 1, 2]
    calls: list[list[int]] = []

    def scores(tokens: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float() * 20

    def step(tokens: Tensor, places: Tensor) -> Tensor:
        nonlocal rows
        rows = [rows[place] for place in places.tolist()]
        assert tokens.tolist() == [script[row][len(calls)] for row in rows]
        calls.append(rows)
        return scores([script[row][len(calls)] for row in rows])

    found = greedy(scores([script[row][0] for row in rows]), step, [4, 3, 4], END)
    assert [row.ids for row in found] == [(), (5, 6, 7), (5,)]
    assert [len(row.probabilities) for row in found] == [1, 3, 2]
    assert calls == [[1, 2], [1]]


def test_confidence_is_the_geometric_mean() -> None:
    assert Generation((1, 2), (0.5, 0.125, 1.0)).confidence == pytest.approx((1 / 16) ** (1 / 3))
    assert Generation((1,), (0.0, 1.0)).confidence == 0.0
    assert Generation((), ()).confidence == 0.0
