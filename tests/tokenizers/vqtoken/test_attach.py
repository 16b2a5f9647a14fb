"""VQToken in unmodified vision-language models: videos shrink to exactly the budget, everything else stays."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny_families
from tests.multimodal.tiny_vlms import IMAGE, Clip, Picture, Row, build, encode, shared
from tokenthrift import attachment
from tokenthrift.attachment import attach
from tokenthrift.attachment.items import Encoded, encoded_items
from tokenthrift.budget import BudgetError, BudgetLike, TokenBudget
from tokenthrift.reducers import Uniform
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken

FAMILIES = pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
# Two clips and a picture in one row, one clip, text only: unequal lengths, so that right padding is real.
ROWS: list[Row] = [[10, Clip(1), 11, Picture(2, 16, 32), 12, Clip(3), 13], [20, 21, Clip(4), 22], [30, 31, 32]]
NATIVE = {"llava_onevision": 4 * 4 + 1, "qwen2_vl": 2 * 4}
GRID = {"llava_onevision": (4, 2, 2), "qwen2_vl": (2, 2, 2)}


class Spy(VQToken):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[TokenBatch] = []

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        self.seen.append(tokens)
        return super().reduce(tokens, budget)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out


@FAMILIES
def test_every_video_has_exactly_its_tokens_and_pictures_stay(family: str) -> None:
    model, spy = shared(family), Spy()
    inputs = encode(model, ROWS, "right")
    before = logits(model, inputs)
    with attach(model, spy, TokenBudget(max_tokens=5)) as handle:
        reduced = logits(model, inputs)
        out = model.generate(**encode(model, ROWS), max_new_tokens=3, do_sample=False)
    assert [(u.native, u.used) for u in handle.usage] == [(NATIVE[family], 5)] * 3
    assert [batch.grids for batch in spy.seen] == [(GRID[family],) * 3] * 2
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    # The row of text alone, and what stands before the first clip, do not know of it.
    torch.testing.assert_close(reduced[2, :3], before[2, :3], rtol=0, atol=1e-4)
    torch.testing.assert_close(reduced[0, :1], before[0, :1], rtol=0, atol=1e-4)
    assert not torch.allclose(reduced[1, -1], before[1, -1], atol=1e-3)
    assert torch.equal(logits(model, inputs), before)


@FAMILIES
def test_a_row_does_not_depend_on_the_others_or_on_the_side_of_padding(family: str) -> None:
    model = shared(family)
    with attach(model, VQToken(), "5"):
        alone = [logits(model, encode(model, [row]))[0] for row in ROWS]
        for side in ("left", "right"):
            inputs = encode(model, ROWS, side)
            for got, real, expected in zip(logits(model, inputs), inputs["attention_mask"].bool(), alone, strict=True):
                torch.testing.assert_close(got[real], expected, rtol=0, atol=1e-4)


@FAMILIES
def test_a_batch_of_pictures_alone_is_untouched_bit_for_bit(family: str) -> None:
    model = shared(family)
    inputs = encode(model, [[10, Picture(1), 11], [20, Picture(2, 16, 32), 21, 22]])
    before = logits(model, inputs)
    with attach(model, VQToken(), "1") as handle:
        with pytest.warns(UserWarning, match=r"VQToken reduces video tokens by default.*the image tokens.*stay whole"):
            assert torch.equal(logits(model, inputs), before)
        assert handle.usage == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model, encode(model, ROWS))  # there are videos to reduce
            logits(model, encode(model, [[10, 11, 12]]))  # and here is nothing to reduce
    with attach(model, VQToken(), "2", modalities=("image",)) as handle:
        assert not torch.equal(logits(model, inputs), before)
    assert [u.used for u in handle.usage] == [2, 2]
    with attach(model, Uniform(), "2", modalities=("video",)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model, inputs), before)
    with pytest.raises(ValueError, match="no modalities that can be reduced: sound"):
        attach(model, Uniform(), "2", modalities=("sound",)).__enter__()


@FAMILIES
def test_tokens_per_second_with_the_durations(family: str) -> None:
    model = shared(family)
    inputs = encode(model, ROWS)
    with attach(model, VQToken(), "2/s", seconds=(1.0, 2.0, 3.0)) as handle:
        logits(model, inputs)
    assert [u.used for u in handle.usage] == [2, 4, 6]
    with attach(model, VQToken(), "e0.5,5") as handle:
        logits(model, inputs)
    assert all(u.used <= 5 and u.error is not None for u in handle.usage)
    with pytest.raises(BudgetError, match="without seconds"):
        attach(model, VQToken(), "2/s").__enter__()
    with (
        attach(model, VQToken(), "2/s", seconds=(1.0,)),
        pytest.raises(ValueError, match="3 items but 1 entries in seconds"),
    ):
        logits(model, inputs)


@FAMILIES
def test_beams_know_the_grids_too(family: str) -> None:
    model, spy = shared(family), Spy()
    with attach(model, spy, "5") as handle:
        model.generate(**encode(model, ROWS[:2]), max_new_tokens=2, num_beams=2, do_sample=False)
    assert len(handle.usage) == 6
    assert spy.seen[0].grids == (GRID[family],) * 6


def test_items_of_rows_that_were_copied_for_beams() -> None:
    small, large = (1, 2, 2), (2, 2, 2)

    def found(counts: list[int], lengths: list[int], grids: list[Any], within: bool = False) -> list[Any]:
        placeholders = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        items = encoded_items("video", placeholders, Encoded(lengths, grids, within))
        return [(item.row, item.columns[0].item(), len(item.columns), item.grid) for item in items]

    once = [(0, 0, 4, small), (0, 4, 8, large)]
    assert found([12, 4], [4, 8, 4], [small, large, small]) == [*once, (1, 0, 4, small)]
    copied = [(row + 1, *rest) for row, *rest in once]
    assert found([12, 12], [4, 8], [small, large]) == [*once, *copied]
    assert found([5, 5], [4, 4], [small, small], within=True) == [(0, 0, 5, small), (1, 0, 5, small)]  # a newline each
    assert found([4], [4], [large]) == [(0, 0, 4, (4, 1, 1))]
    with pytest.raises(ValueError, match="13 placeholders for 12 video tokens in 2 rows"):
        found([12, 1], [4, 8], [small, large])
    with pytest.raises(ValueError, match="more than one row"):
        found([6, 6], [4, 8], [small, large], within=True)


@FAMILIES
def test_leaving_restores_the_model_also_after_an_exception(family: str) -> None:
    model = build(family)
    inputs = encode(model, ROWS)
    before, keys = logits(model, inputs), list(model.state_dict())
    with pytest.raises(RuntimeError, match="of the caller"), attach(model, VQToken(), "3"):
        raise RuntimeError("of the caller")
    broken = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone().fill_(torch.nan)}
    with attach(model, VQToken(), "3"):
        first = logits(model, inputs)
        with pytest.raises(ValueError, match="NaN"):
            logits(model, broken)
        assert torch.equal(logits(model, inputs), first)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), before)
    assert "get_video_features" not in vars(model.model)


def test_videos_in_qwen2_5_vl_and_pictures_counted_apart() -> None:
    assert "qwen2_5_vl" in attachment.FAMILIES
    model = shared("qwen2_5_vl")
    inputs = encode(model, ROWS)
    assert (inputs["input_ids"] == IMAGE).any()
    with attach(model, VQToken(), "50%") as handle:
        logits(model, inputs)
    assert [(u.native, u.used) for u in handle.usage] == [(8, 4)] * 3


def test_deepstack_features_are_averaged_over_the_cluster_of_a_code() -> None:
    model, spy = tiny_families.shared("qwen3_vl"), Spy()
    inputs = tiny_families.encode("qwen3_vl", [[10, Clip(1), 11]])

    def seen(budget: BudgetLike) -> list[Tensor]:
        """The features (N, D) that the layers read beside their tokens."""
        calls: list[dict[str, Any]] = []
        with attach(model, spy, budget):
            layers = model.model.language_model
            hook = layers.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
            logits(model, inputs)
            hook.remove()
        return list(calls[0]["deepstack_visual_embeds"])

    native, reduced = seen(None), seen("3")
    index_map = spy.compress(spy.seen[-1], "3").maps[0].flatten()
    assert index_map.bincount().amax() > 1
    for before, after in zip(native, reduced, strict=True):
        wanted = torch.stack([before[index_map == k].mean(0) for k in range(3)])
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)
