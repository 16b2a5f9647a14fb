"""`attach` on unmodified transformers models: fewer tokens in the layers, everything else as it was."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.multimodal.tiny_vlms import IMAGE, VIDEO, Clip, Picture, Row, build, encode, features, shared
from tokenthrift import attachment
from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.reducers import (
    AveragePooling,
    BipartiteMerging,
    ItemReducer,
    Stacking,
    Uniform,
)
from tokenthrift.tokens import TokenBatch

FAMILIES = pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
ALL_FAMILIES = pytest.mark.parametrize("family", attachment.FAMILIES)
# Unequal pictures, two of them side by side, a clip, and a row of text only.
ROWS: list[Row] = [
    [10, 11, Picture(1, 16, 32), 12, 13],
    [20, Picture(2), Picture(3), 21, 22, 23, 24],
    [30, 31, 32],
    [40, Clip(4), 41, Picture(5, 32, 32), 42, 43],
    [50, Clip(6), 51],
]


def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, **kwargs).logits
    return out


def generated(model: Any, inputs: dict[str, Any], tokens: int = 3, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The new ids (B, tokens), and the logits they were chosen by (B, tokens, V)."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        **({"do_sample": False} | kwargs),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1)


def shrunk_by_hand(model: Any, row: Row, reducer: ItemReducer, budget: str) -> tuple[Tensor, Tensor]:
    """Logits of a row whose embeddings and positions are put together here and given to the bare model.

    Returns:
        (1, K, V) logits, and (K,) the native places they belong to.
    """
    inputs = encode(model, [row])
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)[0]
        positions = None
        if "mm_token_type_ids" in inputs:
            grids = {k: v for k, v in inputs.items() if k.endswith("_grid_thw") or k == "mm_token_type_ids"}
            positions = model.model.get_rope_index(ids, **grids)[0][:, 0]
        queues = {IMAGE: features(model, "image", inputs), VIDEO: features(model, "video", inputs)}
        pieces, places, at = [], [], 0
        while at < ids.shape[1]:
            token = int(ids[0, at])
            if token in queues:
                item = queues[token].pop(0)
                out = reducer.reduce(TokenBatch.from_items([item]), TokenBudget.parse(budget))
                pieces.append(out.embeddings[0])
                places.append(at + out.positions[0])
                at += len(item)
            else:
                pieces.append(embeddings[at : at + 1])
                places.append(torch.tensor([at]))
                at += 1
        where = torch.cat(places)
        given = {} if positions is None else {"position_ids": positions[:, None, where]}
        return model(inputs_embeds=torch.cat(pieces)[None], **given).logits, where


@ALL_FAMILIES
@pytest.mark.parametrize("budget", ["100%", "88"])
def test_a_budget_at_or_above_native_changes_no_bit(family: str, budget: str) -> None:
    model = shared(family)
    inputs = encode(model, ROWS)
    before, ids = logits(model, inputs), generated(model, inputs)
    with attach(model, BipartiteMerging(), budget) as handle:
        assert torch.equal(logits(model, inputs), before)
        assert all(torch.equal(a, b) for a, b in zip(generated(model, inputs), ids, strict=True))
    assert [u.used for u in handle.usage] == [u.native for u in handle.usage]


@ALL_FAMILIES
@pytest.mark.parametrize(
    ("reducer", "budget"),
    [(Uniform(), "3"), (AveragePooling(), "30%"), (BipartiteMerging(), "30%")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_equals_the_bare_model_on_embeddings_shrunk_by_hand(family: str, reducer: ItemReducer, budget: str) -> None:
    model = shared(family)
    for row in ROWS:
        expected, where = shrunk_by_hand(model, row, reducer, budget)
        inputs = encode(model, [row])
        with attach(model, reducer, budget):
            got = logits(model, inputs)
            first = generated(model, inputs, 1)[1]
        assert got.shape[:2] == inputs["input_ids"].shape
        torch.testing.assert_close(got[:, where], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(first[:, 0], expected[:, -1], rtol=0, atol=1e-4)


@ALL_FAMILIES
def test_a_row_of_a_batch_is_the_row_alone(family: str) -> None:
    model, budget = shared(family), "25%"
    alone = [encode(model, [row]) for row in ROWS]
    with attach(model, BipartiteMerging(), budget) as handle:
        singles = [(logits(model, one), generated(model, one), handle.usage) for one in alone]
        for padding in ("left", "right"):
            inputs = encode(model, ROWS, padding)
            rows = zip(logits(model, inputs), inputs["attention_mask"].bool(), singles, strict=True)
            for got, mask, (expected, _, _) in rows:
                torch.testing.assert_close(got[mask], expected[0], rtol=0, atol=1e-4)
        ids, steps = generated(model, encode(model, ROWS))
        for i, (_, (expected_ids, expected_steps), _) in enumerate(singles):
            assert torch.equal(ids[i], expected_ids[0])
            torch.testing.assert_close(steps[i], expected_steps[0], rtol=0, atol=1e-4)
    seen = [usage for row, (_, _, usage) in zip(ROWS, singles, strict=True) if not all(isinstance(p, int) for p in row)]
    assert handle.usage == tuple(u for usage in seen for u in usage)


@FAMILIES
def test_every_picture_is_an_item_even_side_by_side(family: str) -> None:
    model = shared(family)
    with attach(model, Uniform(), "3") as handle:
        logits(model, encode(model, ROWS))
    natives = {"llava_onevision": [52, 17, 17, 17, 88, 17], "qwen2_vl": [8, 4, 4, 8, 16, 8]}[family]
    assert [u.native for u in handle.usage] == natives
    assert [u.used for u in handle.usage] == [3] * 6


@FAMILIES
def test_the_layers_and_the_cache_hold_the_reduced_tokens_only(family: str) -> None:
    model = shared(family)
    inputs = encode(model, [ROWS[0]])
    seen: list[int] = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    native = inputs["input_ids"].shape[1]
    try:
        with attach(model, Uniform(), "25%") as handle:
            out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    finally:
        hook.remove()
    saved = handle.usage[0].native - handle.usage[0].used
    assert saved > 0
    assert seen == [native - saved, 1, 1]
    assert out.past_key_values.get_seq_length() == native - saved + 2
    assert out.sequences.shape[1] == native + 3
    assert torch.equal(out.sequences[:, :native], inputs["input_ids"])


@FAMILIES
def test_generation_is_the_same_with_and_without_a_cache_and_step_by_step(family: str) -> None:
    model = shared(family)
    rows = [ROWS[0], ROWS[1], ROWS[3]]
    inputs = encode(model, rows)
    with attach(model, AveragePooling(), "30%"), torch.no_grad():
        ids, steps = generated(model, inputs, 5)
        torch.testing.assert_close(generated(model, inputs, 5, use_cache=False)[1], steps, rtol=0, atol=1e-4)
        for with_mask in (True, False):
            for i, row in enumerate(rows):
                one = encode(model, [row])
                mask = one.pop("attention_mask")
                out = model(**one, use_cache=True)
                for t in range(4):
                    torch.testing.assert_close(out.logits[0, -1], steps[i, t], rtol=0, atol=1e-4)
                    mask = torch.cat([mask, mask[:, :1]], dim=1)
                    more = {"attention_mask": mask} if with_mask and family == "llava_onevision" else {}
                    out = model(input_ids=ids[i : i + 1, t : t + 1], past_key_values=out.past_key_values, **more)


@FAMILIES
def test_beams_and_samples_do_not_depend_on_the_batch(family: str) -> None:
    model = shared(family)
    rows = [ROWS[0], ROWS[1]]
    with attach(model, Uniform(), "30%") as handle:
        kwargs = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
        together = model.generate(**encode(model, rows), **kwargs)
        assert len(handle.usage) == 9
        for i, row in enumerate(rows):
            assert torch.equal(together[i, -5:], model.generate(**encode(model, [row]), **kwargs)[0, -5:])
        inputs = encode(model, rows[:1])
        several = model.generate(**inputs, max_new_tokens=2, num_return_sequences=4, do_sample=True)
        assert several.shape == (4, inputs["input_ids"].shape[1] + 2)


@FAMILIES
def test_eager_attention_agrees_and_its_maps_have_the_reduced_size(family: str) -> None:
    model, eager = build(family), build(family, attention="eager")
    inputs = encode(model, [ROWS[0], ROWS[2]])
    with attach(model, Uniform(), "25%"), attach(eager, Uniform(), "25%") as handle:
        expected = logits(model, inputs)
        with torch.no_grad():
            out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=1e-4)
    native = inputs["input_ids"].shape[1]
    assert out.attentions[0].shape[-1] == native - handle.usage[0].native + handle.usage[0].used
    assert [state.shape[1] for state in out.hidden_states] == [native] * 3


@FAMILIES
def test_training_reaches_the_encoder_and_dropped_places_predict_from_the_last_kept(family: str) -> None:
    model = build(family)
    inputs = encode(model, [ROWS[0], ROWS[1]])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with attach(model, AveragePooling(), "25%"):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector(model).parameters() if p.ndim > 1)
    picture = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert torch.equal(out.logits[0, picture[-1]], out.logits[0, picture[-2]])
    assert not torch.equal(out.logits[0, picture[0]], out.logits[0, picture[-1]])


def projector(model: Any) -> Any:
    return model.model.multi_modal_projector if hasattr(model.model, "multi_modal_projector") else model.model.visual


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
def test_bfloat16_and_the_model_without_a_head(family: str) -> None:
    model = copy.deepcopy(shared(family)).to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in encode(shared(family), ROWS).items()}
    with attach(model.model, BipartiteMerging(), "25%"), torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        assert states.dtype == torch.bfloat16
        assert states.isfinite().all()
        assert torch.equal(model(**inputs).logits, model.lm_head(states))


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
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    with attach(model, Uniform(), "25%"):
        assert logits(model, {**inputs, "position_ids": places}).isfinite().all()
        with pytest.raises(ValueError, match="packed"):
            logits(model, {**inputs, "position_ids": places.where(places < 2, places - 2)})


def test_what_cannot_be_attached_raises_before_anything_is_touched() -> None:
    model = shared("qwen2_vl")
    inside = traces(model)
    tiny = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, pad_token_id=0
    )
    refused: Sequence[tuple[Any, ItemReducer, str, type[Exception], str]] = [
        (LlamaForCausalLM(tiny), Uniform(), "4", ValueError, "llama; supported families: llava_onevision"),
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


def test_earlier_releases_of_transformers_differ_in_two_ways() -> None:
    """A clip's newline may come after its encoding, and the places in the cache may be handed over."""
    model = shared("llava_onevision")
    inputs = encode(model, [ROWS[3], ROWS[4]])
    with attach(model, Uniform(), "25%") as handle:
        native = generated(model, inputs)[1]
        encode_clips = model.model.get_video_features

        def without_newline(*args: Any, **kwargs: Any) -> Any:
            output = encode_clips(*args, **kwargs)
            handle._lengths["video"] = [n - 1 for n in handle._lengths["video"]]
            return output

        model.model.get_video_features = without_newline
        try:
            usage = handle.usage
            logits(model, inputs)
            assert handle.usage == usage
        finally:
            model.model.get_video_features = encode_clips
        seen: list[Any] = []
        layers = model.model.language_model
        hook = layers.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("cache_position")), with_kwargs=True
        )
        try:
            places = torch.arange(inputs["input_ids"].shape[1])
            torch.testing.assert_close(logits(model, inputs, cache_position=places)[:, -1], native[:, 0])
        finally:
            hook.remove()
    assert seen == [None]
