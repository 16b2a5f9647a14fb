"""`attach(..., at="encoder")`: fewer patches in the vision tower, and the budget kept in the language model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.test_attachment_limits import traces
from tests.multimodal.tiny_families import build, encode, rows_of, shared
from tests.multimodal.tiny_vlms import Clip, Picture, generated, logits
from tokenthrift.attachment import attach
from tokenthrift.reducers import BipartiteMerging, ItemReducer, Prefix, TemporalMerging, Uniform

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ROWS = ("llava", "llava_next_video", "llava_onevision", "video_llava", "gemma3", "paligemma")
EVERY = pytest.mark.parametrize("family", [*QWEN, *ROWS, "llava_next", "qwen2_5_omni_thinker"])
KINDS = pytest.mark.parametrize("reducer", [Uniform(), BipartiteMerging()], ids=["Uniform", "BipartiteMerging"])


def tower_lengths(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Patches that each layer of the vision tower reads."""
    name = next(name for name in ("visual", "vision_tower", "image_tower") if hasattr(model.model, name))
    tower = getattr(model.model, name)
    layers = tower.blocks if hasattr(tower, "blocks") else tower.encoder.layers
    seen: list[int] = []
    hooks = [layer.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2])) for layer in layers]
    try:
        logits(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@EVERY
@KINDS
def test_an_unlimited_budget_changes_nothing_and_leaving_restores(family: str, reducer: ItemReducer) -> None:
    model, inputs = shared(family), encode(family, rows_of(family))
    before, inside = logits(model, inputs), traces(model)
    with attach(model, reducer, at="encoder", modalities=("image",)):
        torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-4)
    assert traces(model) == inside
    assert torch.equal(logits(model, inputs), before)


@EVERY
@KINDS
def test_the_budget_holds_in_the_tower_and_in_the_language_model(family: str, reducer: ItemReducer) -> None:
    model, inputs = shared(family), encode(family, rows_of(family))
    native = tower_lengths(model, inputs)
    with attach(model, reducer, "50%") as outside:
        logits(model, inputs)
    with attach(model, reducer, "50%", at="encoder") as handle:
        lengths = tower_lengths(model, inputs)
        assert handle.usage == outside.usage
        assert all(2 * u.used <= u.native for usage in handle.encoder_usage.values() for u in usage)
        ids, steps = generated(model, inputs, 2)
        for i, row in enumerate(rows_of(family)):
            one = generated(model, encode(family, [row]), 2)
            assert torch.equal(one[0][0], ids[i])
            torch.testing.assert_close(one[1][0], steps[i], rtol=0, atol=1e-4)
    assert all(short < long for short, long in zip(lengths, native, strict=True))


@pytest.mark.parametrize("family", QWEN)
def test_dropped_patches_do_not_reach_the_tower_and_kept_ones_are_their_tokens(family: str) -> None:
    """A frame that repeats the one before it costs nothing: its result is that of the clip of one frame pair."""
    model = shared(family)
    rows: list[Any] = [[10, Clip(1, 8), 11]]
    inputs = encode(family, rows)
    pixels = inputs["pixel_values_videos"].view(4, 16, 96)
    pixels[1:] = pixels[:1]
    with attach(model, TemporalMerging(), 4, at="encoder") as handle:
        logits(model, inputs)
        assert [(u.native, u.used) for u in handle.encoder_usage["video"]] == [(16, 4)]
        assert [u.used for u in handle.usage] == [4]
        first = logits(model, inputs)[0, 2:4]
        pixels[1:] += 0.0
        torch.testing.assert_close(logits(model, inputs)[0, 2:4], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", "llava_next_video"])
def test_static_patches_are_dropped_across_the_frames_of_rows(family: str) -> None:
    model, inputs = shared(family), encode(family, [[10, Clip(1), 11], [12, Clip(2), 13]])
    inputs["pixel_values_videos"][:, 1:] = inputs["pixel_values_videos"][:, :1]
    with attach(model, TemporalMerging(), "25%", at="encoder") as handle:
        got = logits(model, inputs)
    assert [(u.native, u.used) for u in handle.encoder_usage["video"]] == [(64, 16)] * 2
    assert got.isfinite().all()
    assert all(u.used <= u.native // 4 for u in handle.usage)


@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", "llava_next_video"])
def test_frames_that_became_short_share_a_row_and_do_not_see_each_other(family: str) -> None:
    model, inputs = shared(family), encode(family, [[10, Clip(1), 11], [12, Clip(2), 13]])
    tower = model.model.video_tower if family == "video_llava" else model.model.vision_tower
    states: list[Tensor] = []
    read: list[int] = []

    def run(given: dict[str, Any]) -> tuple[Tensor, int]:
        """What the tower gives (F, N, D), and how many tokens its last layer reads."""
        hooks = [
            tower.encoder.register_forward_hook(lambda m, args, out: states.append(out.last_hidden_state)),
            tower.encoder.layers[-1].register_forward_hook(lambda m, args, out: read.append(out[..., 0].numel())),
        ]
        logits(model, given)
        for hook in hooks:
            hook.remove()
        return states[-1], read[-1]

    with attach(model, Prefix(), 24, at="encoder"):  # frames of 16, 8, 0 and 0 patches
        both, short = run(inputs)
        alone = [run(encode(family, [[10, Clip(seed), 11]]))[0] for seed in (1, 2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-4)
    inputs["pixel_values_videos"][:, 1:] = inputs["pixel_values_videos"][:, :1]
    native, whole = run(inputs)
    with attach(model, TemporalMerging(), "25%", at="encoder"):
        reduced, least = run(inputs)
    torch.testing.assert_close(reduced[:, -16:], native[:, -16:], rtol=0, atol=1e-4)
    assert 2 * short <= whole
    assert 2 * least < whole


def test_training_through_a_reduced_tower() -> None:
    for family in ("llava", "qwen2_5_vl"):
        model = build(family)
        inputs = encode(family, [[10, Picture(1), 11, 12]])
        with attach(model, "tome:50%", at="encoder"):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        tower = model.model.visual if family != "llava" else model.model.vision_tower
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_what_the_encoder_cannot_know_is_refused() -> None:
    for family, options, message in (
        ("llava", {"total": 8}, "need the prompt"),
        ("llava", {"budget": ["50%"]}, "need the prompt"),
        ("voxtral", {"budget": "50%"}, "encoder of voxtral"),
        ("internvl", {"budget": "50%"}, "encoder of internvl"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(shared(family), Uniform(), at="encoder", **options).__enter__()
    with pytest.raises(ValueError, match="not 'llm'"):
        attach(shared("llava"), Uniform(), at="llm").__enter__()  # type: ignore[arg-type]
