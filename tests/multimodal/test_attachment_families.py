"""Every family that `attach` knows, on a tiny random model of transformers' own class: one contract for all."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.test_attachment_limits import traces
from tests.multimodal.tiny_families import TINY, build, encode, rows_of, shared
from tests.multimodal.tiny_media import AUDIO, Recording
from tests.multimodal.tiny_vlms import IMAGE, VIDEO, Clip, Picture, generated, logits, noise
from tokenthrift.attachment import FAMILIES, attach
from tokenthrift.reducers import AveragePooling, BipartiteMerging, ItemReducer, Uniform
from tokenthrift.tokens import TokenBatch

EVERY = pytest.mark.parametrize("family", FAMILIES)
SLOTS = {Picture: IMAGE, Clip: VIDEO, Recording: AUDIO}


def natives(family: str) -> list[int]:
    return [TINY[family].count(part) for row in rows_of(family) for part in row if not isinstance(part, int)]


def seam(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The layers, and what the bare model calls them with."""
    layers, seen = getattr(model.model, FAMILIES[model.model.config.model_type].language), {}
    hook = layers.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        logits(model, inputs)
    finally:
        hook.remove()
    return layers, seen


def shrunk_by_hand(family: str, row: Any, reducer: ItemReducer, budget: str) -> tuple[Tensor, Tensor]:
    """Logits (1, K, V) of the bare model on a row put together here, and the (K,) native columns they belong to."""
    model, inputs = shared(family), encode(family, [row])
    layers, seen = seam(model, inputs)
    embeddings, ids = seen["inputs_embeds"][0].clone(), inputs["input_ids"][0]
    deep = [feature.clone() for feature in seen.get("deepstack_visual_embeds") or ()]
    marked: Any = seen.get("visual_pos_masks")
    keep = torch.ones(len(ids), dtype=torch.bool)
    queues = {kind: (ids == token).nonzero().flatten().tolist() for kind, token in SLOTS.items()}
    for part in row:
        if isinstance(part, int):
            continue
        columns = torch.tensor([queues[type(part)].pop(0) for _ in range(TINY[family].count(part))])
        reduced = reducer.reduce(TokenBatch.from_items([embeddings[columns]]), budget)
        keep[columns] = False
        at = columns[reduced.positions[0]]
        keep[at] = True
        for feature in deep:
            places = (marked[0].cumsum(0) - 1)[columns]
            values, sources = feature[places], reduced.sources
            for k, position in enumerate(reduced.positions[0]):
                members = [int(position)] if sources is None else (sources[0] == k).nonzero().flatten().tolist()
                feature[places[position]] = values[members].mean(0)
        embeddings[at] = reduced.embeddings[0]
    given: dict[str, Any] = {"inputs_embeds": embeddings[None, keep]}
    if seen.get("position_ids") is not None and seen["position_ids"].ndim == 3:
        given["position_ids"] = seen["position_ids"][..., keep]
    with torch.no_grad():
        if deep:
            given |= {"visual_pos_masks": marked[:, keep]}
            given["deepstack_visual_embeds"] = [feature[keep[marked[0]]] for feature in deep]
            return model.lm_head(layers(**given).last_hidden_state), keep.nonzero().flatten()
        if "token_type_ids" in inputs:
            given["token_type_ids"] = inputs["token_type_ids"][:, keep]
        return model(**given).logits, keep.nonzero().flatten()


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert set(TINY) == set(FAMILIES)


@EVERY
def test_a_budget_at_or_above_native_changes_no_bit(family: str) -> None:
    model, inputs = shared(family), encode(family, rows_of(family))
    before, ids = logits(model, inputs), generated(model, inputs)
    with attach(model, BipartiteMerging()) as handle:
        assert torch.equal(logits(model, inputs), before)
        assert all(torch.equal(a, b) for a, b in zip(generated(model, inputs), ids, strict=True))
    assert [(u.native, u.used) for u in handle.usage] == [(n, n) for n in natives(family)]


@EVERY
@pytest.mark.parametrize("reducer", [Uniform(), BipartiteMerging()], ids=["Uniform", "BipartiteMerging"])
def test_equals_the_bare_model_on_a_row_shrunk_by_hand(family: str, reducer: ItemReducer) -> None:
    model, row = shared(family), rows_of(family)[1]
    expected, columns = shrunk_by_hand(family, row, reducer, "50%")
    with attach(model, reducer, "50%"):
        got = logits(model, encode(family, [row]))
    torch.testing.assert_close(got[:, columns], expected, rtol=0, atol=1e-4)


@EVERY
def test_a_row_of_a_batch_is_the_row_alone_and_really_shorter(family: str) -> None:
    """Padding on both sides, several items a row, usage equal to the plan, with and without a cache, beams."""
    model, rows, reducer = shared(family), rows_of(family), BipartiteMerging()
    layers = getattr(model.model, FAMILIES[family].language)
    lengths: list[int] = []
    with attach(model, reducer, "50%") as handle:
        alone = [(logits(model, one), generated(model, one, 2)) for one in (encode(family, [row]) for row in rows)]
        for padding in ("left", "right"):
            inputs = encode(family, rows, padding)
            for got, mask, (expected, _) in zip(
                logits(model, inputs), inputs["attention_mask"].bool(), alone, strict=True
            ):
                torch.testing.assert_close(got[mask], expected[0], rtol=0, atol=1e-4)
        inputs = encode(family, rows)
        hook = layers.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        cached = generated(model, inputs, 2)
        hook.remove()
        assert handle.usage == reducer.plan(natives(family), "50%")
        uncached = generated(model, inputs, 2, use_cache=False)
        for i, (_, (ids, steps)) in enumerate(alone):
            for got in (cached, uncached):
                assert torch.equal(got[0][i], ids[0])
                torch.testing.assert_close(got[1][i], steps[0], rtol=0, atol=1e-4)
        beams = model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)[:, -2:]
        assert len(handle.usage) == 2 * len(natives(family))
        for i, row in enumerate(rows):
            one = encode(family, [row])
            assert torch.equal(model.generate(**one, max_new_tokens=2, num_beams=2, do_sample=False)[0, -2:], beams[i])
    saved = sum(u.native - u.used for u in reducer.plan(natives(family), "50%")[1:])  # of the second row, the longest
    assert lengths == [inputs["input_ids"].shape[1] - saved, 1]


@EVERY
def test_training_reaches_the_encoder_and_leaving_restores_the_model(family: str) -> None:
    model = copy.deepcopy(shared(family))
    inputs, inside, before = encode(family, rows_of(family)), traces(model), None
    before = logits(model, inputs)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with attach(model, AveragePooling(), "50%"):
        assert list(model.state_dict()) == list(shared(family).state_dict())
        model(**inputs, labels=labels).loss.backward()
    layers = f"model.{FAMILIES[family].language}."
    encoder = [p for name, p in model.named_parameters() if not name.startswith((layers, "lm_head")) and p.ndim > 1]
    assert encoder
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder)
    assert traces(model) == inside
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "paligemma", "qwen2_audio", "voxtral"])
def test_eager_attention_agrees(family: str) -> None:
    inputs = encode(family, rows_of(family))
    with attach(shared(family), Uniform(), "50%"):
        expected = logits(shared(family), inputs)
    eager = build(family, "eager")
    with attach(eager, Uniform(), "50%"):
        got = logits(eager, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-4)


def test_frames_of_a_glm_clip_stand_at_placeholders_of_pictures() -> None:
    """Two pairs of frames of 4 tokens each, with a time stamp between them: one item under the budget."""
    model, frame = shared("glm4v"), [IMAGE] * 4
    ids = torch.tensor([[10, 6, 1, *frame, 2, 11, 1, *frame, 2, 12, 7, 13]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == IMAGE).int(),
        "pixel_values_videos": noise(1, 32, 96),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    before = logits(model, inputs)
    with attach(model, Uniform(), 2) as handle:
        assert not torch.allclose(logits(model, inputs), before)
        generated(model, inputs, 2)  # transformers itself has no beams over such clips
    assert [(u.native, u.used) for u in handle.usage_by_modality["video"]] == [(8, 2)]
