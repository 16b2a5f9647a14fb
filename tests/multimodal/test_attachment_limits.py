"""`attach` leaves nothing behind, on one model or another, and says what it cannot shorten."""

import copy
import io
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.multimodal.tiny_vlms import IMAGE, ROWS, Picture, build, encode, generated, logits, projector, shared
from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetError
from tokenthrift.reducers import (
    BipartiteMerging,
    ItemReducer,
    Stacking,
    Uniform,
)

FAMILIES = pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])


@FAMILIES
def test_leaving_restores_the_model_also_after_an_exception(family: str) -> None:
    model = build(family)
    inputs = encode(model, ROWS)
    before, keys, inside = logits(model, inputs), list(model.state_dict()), traces(model)
    ids = generated(model, inputs)[0]
    with attach(model, Uniform(), "25%"):
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model, inputs), before)
    assert traces(model) == inside
    with pytest.raises(RuntimeError, match="of the caller"), attach(model, Uniform(), "25%"):
        raise RuntimeError("of the caller")
    with pytest.raises(BudgetError, match="min_tokens"), attach(model, Uniform(), "1%"):
        logits(model, inputs)
    assert traces(model) == inside
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(generated(model, inputs)[0], ids)


def traces(model: Any) -> list[Any]:
    """Everything a plugin could leave behind on an instance or its class."""
    return [
        (
            type(m),
            sorted(m.__dict__),
            [list(h.values()) for k, h in m.__dict__.items() if "hooks" in k and isinstance(h, dict)],
        )
        for m in model.modules()
    ] + [[vars(c).get(n) for c in type(model.model).__mro__] for n in ("forward", "get_image_features")]


@FAMILIES
def test_a_failed_call_leaves_nothing_for_the_next(family: str) -> None:
    model = build(family)
    language, inputs = model.model.language_model, encode(model, ROWS)
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone().fill_(torch.nan)}
    text = {k: v[2:3, -3:] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    embeddings = model.get_input_embeddings()(text["input_ids"])
    with torch.no_grad():
        bare = logits(model, text), language(inputs_embeds=embeddings).last_hidden_state

    def fail(*_: Any) -> None:
        raise RuntimeError("in a layer")

    with attach(model, Uniform(), "25%") as handle, torch.no_grad():
        before, usage = logits(model, inputs), handle.usage
        with pytest.raises(ValueError, match="NaN"):
            logits(model, broken)
        hook = language.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in a layer"):
            logits(model, inputs)
        hook.remove()
        assert torch.equal(language(inputs_embeds=embeddings).last_hidden_state, bare[1])
        assert torch.equal(logits(model, text), bare[0])
        assert handle.usage == usage
        assert torch.equal(logits(model, inputs), before)


@FAMILIES
def test_two_models_of_one_class_have_nothing_in_common(family: str) -> None:
    first, second = build(family, seed=1), build(family, seed=2)
    inputs = encode(first, ROWS)
    alone = []
    for model, budget in ((first, "2"), (second, "50%")):
        with attach(model, Uniform(), budget):
            alone.append(logits(model, inputs))
    untouched = logits(second, inputs)
    with attach(first, Uniform(), "2"):
        assert torch.equal(logits(second, inputs), untouched)
        with attach(second, Uniform(), "50%"):
            assert torch.equal(logits(first, inputs), alone[0])
            assert torch.equal(logits(second, inputs), alone[1])
        assert torch.equal(logits(second, inputs), untouched)
        assert torch.equal(logits(first, inputs), alone[0])


@FAMILIES
def test_calls_that_cannot_be_shortened_say_so(family: str) -> None:
    model = shared(family)
    inputs = encode(model, [ROWS[0]])
    one = inputs["input_ids"][:, -1:]
    with attach(model, Uniform(), "25%"), torch.no_grad():
        with pytest.raises(ValueError, match="no static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
        rest["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="needs input_ids"):
            model(**rest)
        cache = model(**inputs).past_key_values
        with pytest.raises(ValueError, match="start of a key-value cache"):
            model(**inputs, past_key_values=cache)
        done = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        text = {"input_ids": torch.cat([done.sequences, one], dim=1), "past_key_values": done.past_key_values}
        with pytest.raises(ValueError, match="pass the whole conversation"):
            model.generate(**text, max_new_tokens=2)
        cache = model(**inputs).past_key_values
        cache.crop(-3)
        with pytest.raises(ValueError, match="does not fit"):
            model(input_ids=one, past_key_values=cache)


def test_packed_rows_raise() -> None:
    model = shared("llava_onevision")
    inputs = encode(model, [ROWS[0]])
    del inputs["attention_mask"]
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with attach(model, Uniform(), "25%"):
        assert logits(model, {**inputs, "position_ids": positions}).isfinite().all()
        with pytest.raises(ValueError, match="packed"):
            logits(model, {**inputs, "position_ids": positions.where(positions < 2, positions - 2)})


def test_what_cannot_be_attached_raises_before_anything_is_touched() -> None:
    model = shared("qwen2_vl")
    inside = traces(model)
    tiny = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, pad_token_id=0
    )
    refused: Sequence[tuple[Any, ItemReducer, str, type[Exception], str]] = [
        (LlamaForCausalLM(tiny), Uniform(), "4", ValueError, "llama; supported families: llava, llava_next"),
        (torch.nn.Linear(2, 2), Uniform(), "4", ValueError, "Linear; supported"),
        (model, Uniform(), "e0.05", BudgetError, "target_error"),
        (model, Uniform(), "12.5/s", BudgetError, "tokens_per_second"),
        (model, Uniform(), "many", BudgetError, "many"),
    ]
    for target, reducer, budget, error, message in refused:
        with pytest.raises(error, match=message), attach(target, reducer, budget):
            pytest.fail("attached")
    with attach(model, Uniform(), "4"):
        with pytest.raises(RuntimeError, match="attached already"), attach(model, Uniform(), "4"):
            pytest.fail("attached twice")
        assert traces(model) != inside
    assert traces(model) == inside
    with (
        attach(model, Stacking(rate=4), "4"),
        pytest.raises(ValueError, match="Stacking makes embeddings of width 128"),
    ):
        logits(model, encode(model, ROWS))


def test_placeholders_of_one_picture_in_two_rows_raise() -> None:
    model = shared("llava_onevision")
    inputs = encode(model, [[Picture(1)], [10]])
    inputs["input_ids"] = inputs["input_ids"][inputs["input_ids"] == IMAGE].reshape(2, -1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with attach(model, Uniform(), "25%"), pytest.raises(ValueError, match="more than one row"):
        logits(model, inputs)


@FAMILIES
def test_threads_that_share_an_attached_model_get_their_own_answers(family: str) -> None:
    """Interleaved at every hook by barriers, so that state kept on the shared object is mixed up every time."""
    model = shared(family)
    prompts = [encode(model, [ROWS[0]]), encode(model, [ROWS[3], ROWS[4]])]
    with attach(model, BipartiteMerging(), "25%") as handle:
        alone = []
        for prompt in prompts:
            alone.append((generated(model, prompt)[0], handle.usage))
        barrier = threading.Barrier(2, timeout=60)

        def wait(*_: Any) -> None:
            with suppress(threading.BrokenBarrierError):  # the longer answer goes on alone
                barrier.wait()

        def work(prompt: dict[str, Any]) -> tuple[Tensor, Any]:
            ids = generated(model, prompt)[0]
            barrier.abort()
            return ids, handle.usage

        hooks = [
            module.register_forward_pre_hook(wait)
            for module in (model.model, model.model.language_model, projector(model))
        ]
        try:
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(work, prompts))
        finally:
            for hook in hooks:
                hook.remove()
    for (ids, usage), (wanted, expected) in zip(together, alone, strict=True):
        assert torch.equal(ids, wanted)
        assert usage == expected


def test_copies_pickles_and_replicas_of_an_attached_model_are_refused() -> None:
    model = build("qwen2_vl")
    inputs = encode(model, ROWS)
    with attach(model, Uniform(), "25%"):
        for copied in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(RuntimeError, match="copy it first"):
                copied(model)
        shallow = copy.copy(model)
        shallow._modules = {**model._modules, "model": copy.copy(model.model)}
        replica = model.model._replicate_for_data_parallel()
        for other in (shallow.model, replica):
            with pytest.raises(RuntimeError, match="copy it first"):
                other(**inputs)
    twin = copy.deepcopy(model)
    with attach(twin, Uniform(), "25%"):
        reduced = logits(twin, inputs)
    assert not torch.equal(reduced, logits(model, inputs))
