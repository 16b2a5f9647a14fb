"""Streams: as good as the whole clip at once, exact in what they count, and bounded in what they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tokenizers.vqtoken.clips import noise, same_partition
from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.vqtoken.clustering import cluster
from tokenthrift.vqtoken.streaming import Stream


def clip(frames: int = 24, clusters: int = 12) -> tuple[Tensor, Tensor]:
    """Clusters that come and go: a stretch of the clip shows four of them."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.arange(frames)[:, None, None] * (clusters - 3) // frames
    truth = shown + torch.randint(0, 4, (frames, 4, 4), generator=generator)
    return noise(1, clusters, 32)[truth] + 0.3 * noise(2, frames, 4, 4, 32), truth


@pytest.mark.parametrize("chunk", [2, 7, 24])
def test_finds_what_the_whole_clip_at_once_shows(chunk: int) -> None:
    x, truth = clip()
    stream = Stream(36)
    ids = [stream.push(part) for part in x.split(chunk)]
    done = stream.finish(12, seconds=12.0)
    codes = torch.cat([done.resolve(part) for part in ids])
    assert codes.shape == truth.shape
    assert same_partition(codes.flatten(), truth.flatten())
    whole = cluster(x.flatten(0, 2)[None], 12)
    (usage,) = done.tokens.usage
    assert usage.error == pytest.approx(float(whole.error()), rel=1e-4)
    assert (usage.native, usage.cap, usage.used) == (384, 12, 12)
    assert done.tokens.sizes is not None
    assert done.tokens.sizes[0].tolist() == torch.bincount(codes.flatten()).tolist()
    means = torch.stack([x[codes == k].mean(0) for k in range(12)])
    torch.testing.assert_close(done.tokens.embeddings[0], means, rtol=1e-4, atol=1e-5)
    assert done.tokens.positions.diff(dim=1).min() > 0
    times = [(codes == k).nonzero()[:, 0].double().mean() for k in range(12)]
    assert all(late - early > -1 for early, late in zip(times, times[1:], strict=False))
    assert done.tokens.seconds == (12.0,)


def test_a_target_error_takes_fewer() -> None:
    x, _ = clip()
    stream = Stream(36)
    for part in x.split(6):
        stream.push(part)
    few, many = (stream.finish(budget).tokens.usage[0] for budget in ("e0.5", "30,e0.05"))
    assert few.error is not None
    assert few.error <= 0.5
    assert few.used < many.used <= 30
    assert stream.finish("30,e0.5").tokens.usage[0].used == few.used


def test_what_is_held_does_not_grow_and_more_may_follow() -> None:
    x, _ = clip()
    stream = Stream(20)
    held = []
    for part in x.split(2):
        stream.push(part)
        held.append(sum(v.numel() for k, v in vars(stream).items() if isinstance(v, Tensor) and k != "_owner"))
        assert stream.finish(4).tokens.usage[0].native == stream.frames * 16
    assert held[3:] == [held[3]] * len(held[3:])
    assert stream.frames == 24


def test_half_precision_and_equal_frames() -> None:
    stream = Stream(12)
    for _ in range(3):
        stream.push(torch.ones(2, 2, 2, 8, dtype=torch.bfloat16))
    done = stream.finish("e0.1")
    assert done.tokens.embeddings.dtype == torch.bfloat16
    assert done.tokens.usage[0].used == 1
    assert torch.equal(done.tokens.embeddings.float(), torch.ones(1, 1, 8))
    still = Stream(96)
    ids = [still.push(torch.ones(1, 2, 2, 8)) for _ in range(2)]
    few = still.finish(8)
    (usage,) = few.tokens.usage
    assert (usage.native, usage.cap) == (8, 8)
    assert usage.used == few.tokens.mask.sum() < 8
    assert few.tokens.sizes is not None
    assert few.tokens.sizes.sum() == 8
    assert max(int(few.resolve(part).max()) for part in ids) < usage.used


def test_a_budget_of_nothing_leaves_nothing() -> None:
    stream = Stream()
    ids = stream.push(noise(0, 2, 2, 2, 8))
    done = stream.finish(TokenBudget(retention=0.05, min_tokens=0), seconds=1.0)
    assert done.tokens.embeddings.shape == (1, 0, 8)
    assert (done.tokens.usage[0].native, done.tokens.usage[0].cap) == (8, 0)
    assert done.resolve(ids).unique().tolist() == [-1]


def test_wrong_use_is_named() -> None:
    stream = Stream(8)
    with pytest.raises(ValueError, match="at least one frame"):
        stream.finish(4)
    for wrong in (torch.ones(2, 2, 8), torch.ones(0, 2, 2, 8)):
        with pytest.raises(ValueError, match=r"\(T, H, W, D\)"):
            stream.push(wrong)
    stream.push(noise(0, 4, 3, 3, 8))
    with pytest.raises(ValueError, match="those before"):
        stream.push(noise(0, 4, 2, 3, 8))
    with pytest.raises(ValueError, match="NaN"):
        stream.push(torch.full((1, 3, 3, 8), torch.nan))
    with pytest.raises(BudgetError, match="codebook_size=8"):
        stream.finish(9)
    with pytest.raises(BudgetError, match="unknown duration"):
        stream.finish("2/s")
    assert stream.finish("2/s", seconds=2.0).tokens.usage[0].used == 4
    with pytest.raises(ValueError, match="codebook_size is at least 1"):
        Stream(0)
