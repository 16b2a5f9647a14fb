"""`attach` on unmodified transformers models: fewer tokens in the layers, everything else as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.tiny_vlms import (
    IMAGE,
    ROWS,
    VIDEO,
    Row,
    build,
    encode,
    features,
    generated,
    logits,
    projector,
    shared,
)
from tokenthrift.attachment import attach
from tokenthrift.budget import TokenBudget
from tokenthrift.reducers import (
    AveragePooling,
    BipartiteMerging,
    ItemReducer,
    Uniform,
)
from tokenthrift.tokens import TokenBatch

FAMILIES = pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])

ALL_FAMILIES = pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])


def shrunk_by_hand(model: Any, row: Row, reducer: ItemReducer, budget: str) -> tuple[Tensor, Tensor]:
    """Logits of a row whose embeddings and positions are put together here and given to the bare model.

    Returns:
        (1, K, V) logits, and (K,) the native columns they belong to.
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
        pieces, columns_of, at = [], [], 0
        while at < ids.shape[1]:
            token = int(ids[0, at])
            if token in queues:
                item = queues[token].pop(0)
                out = reducer.reduce(TokenBatch.from_items([item]), TokenBudget.parse(budget))
                pieces.append(out.embeddings[0])
                columns_of.append(at + out.positions[0])
                at += len(item)
            else:
                pieces.append(embeddings[at : at + 1])
                columns_of.append(torch.tensor([at]))
                at += 1
        where = torch.cat(columns_of)
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
def test_training_reaches_the_encoder_and_dropped_positions_predict_from_the_last_kept(family: str) -> None:
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


@FAMILIES
def test_bfloat16_and_the_model_without_a_head(family: str) -> None:
    model = copy.deepcopy(shared(family)).to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in encode(shared(family), ROWS).items()}
    with attach(model.model, BipartiteMerging(), "25%"), torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        assert states.dtype == torch.bfloat16
        assert states.isfinite().all()
        assert torch.equal(model(**inputs).logits, model.lm_head(states))


def test_earlier_releases_of_transformers_differ_in_two_ways() -> None:
    """A clip's newline may come after its encoding, and the positions in the cache may be handed over."""
    model = shared("llava_onevision")
    inputs = encode(model, [ROWS[3], ROWS[4]])
    with attach(model, Uniform(), "25%") as handle:
        native = generated(model, inputs)[1]
        encode_clips = model.model.get_video_features

        def without_newline(*args: Any, **kwargs: Any) -> Any:
            output = encode_clips(*args, **kwargs)
            call = handle._thread.call
            assert call is not None
            clips = call.encoded["video"]
            call.encoded["video"] = clips._replace(lengths=[n - 1 for n in clips.lengths])
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
            positions = torch.arange(inputs["input_ids"].shape[1])
            torch.testing.assert_close(logits(model, inputs, cache_position=positions)[:, -1], native[:, 0])
        finally:
            hook.remove()
    assert seen == [None]
