"""VQToken as a reducer: the laws of the budget interface, order and places of codes, and a live language model."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.multimodal.budget_strategies import budgets
from tests.multimodal.tiny_vlms import Clip, Picture, encode, shared
from tests.tokenizers.vqtoken.clips import mixture, noise
from tokenthrift import vqtoken as package
from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetError, BudgetLike, ItemSize, TokenBudget
from tokenthrift.config import ConfigError
from tokenthrift.models import describe
from tokenthrift.reducers import AveragePooling, TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import AttentionConfig, VQToken, VQTokenConfig

MEAN, MEDOID, ELBOW = (
    VQToken(),
    VQToken(VQTokenConfig(code_type="medoid")),
    VQToken(VQTokenConfig(selection_method="elbow")),
)
SILHOUETTE = VQToken(VQTokenConfig(selection_method="silhouette", min_clusters=2))
RELEASED = VQToken(VQTokenConfig(compat="released"))
MODELS = [MEAN, MEDOID, ELBOW, SILHOUETTE, RELEASED]
EVERY = pytest.mark.parametrize("model", MODELS, ids=["mean", "medoid", "elbow", "silhouette", "released"])
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=3)
ERRORS = st.none() | st.sampled_from([0.0, 0.1, 0.4, 0.9])
FEW = settings(deadline=None, max_examples=8)


def batch_of(lengths: list[int], seed: int = 0, newline: bool = False) -> TokenBatch:
    """Clips of frames of three patches where the length allows it, else of one."""
    items = [noise(seed + i, n, 6) for i, n in enumerate(lengths)]
    grids = [(n // 3, 1, 3) if newline or n % 3 == 0 else (n, 1, 1) for n in lengths]
    return TokenBatch.from_items(items, [n / 10 for n in lengths], grids)


def target(model: VQToken, budget: TokenBudget, error: float | None) -> TokenBudget:
    return replace(budget, target_error=error) if "target_error" in model.support.fields else budget


def test_the_package_lists_its_modules() -> None:
    assert package.__doc__ is not None
    assert package.__file__ is not None
    root = Path(package.__file__).parent
    modules = {path.stem for path in root.glob("*.py")} - {"__init__"}
    assert len(modules) <= 12, "a user, a trainer and an evaluator have rooms of their own"
    rooms = {path.parent.name for path in root.glob("*/*.py")}
    assert modules | rooms <= set(re.findall(r"\w+", package.__doc__))
    assert set(re.findall(r"^(\w+)  ", package.__doc__, re.MULTILINE)) <= modules | rooms
    assert all(getattr(package, name).__name__ == name for name in package.__all__)


@pytest.mark.parametrize("model", [MEAN, RELEASED], ids=["mean", "released"])
def test_sources_name_the_cells_of_every_code(model: VQToken) -> None:
    tokens = batch_of([13, 4, 30, 7], newline=True)  # the second is left whole; three newlines
    once = model.compress(tokens, ["3", None, "5", "1"])
    assert once.tokens.sources is not None
    for found, index_map, grid, native in zip(
        once.tokens.sources, once.maps, tokens.grids or (), (13, 4, 30, 7), strict=True
    ):
        assert torch.equal(found[: math.prod(grid)], index_map.flatten())
        assert (found[native:] == -1).all()
    assert once.tokens.sources[0, 12] == 2  # this newline is kept behind two codes,
    assert once.tokens.sources[3, 6] == -1  # and this one has no room
    twice = model.reduce(once.tokens, "2").sources
    assert twice is not None
    assert [len(set(row[:n].tolist())) for row, n in zip(twice, (13, 4, 30), strict=False)] == [2, 2, 2]
    assert MEDOID.reduce(tokens, "3").sources is None


@EVERY
@FEW
@given(lengths=LENGTHS, budget=budgets(), error=ERRORS, seed=st.integers(0, 99), newline=st.booleans())
def test_keeps_to_its_plan(
    model: VQToken, lengths: list[int], budget: TokenBudget, error: float | None, seed: int, newline: bool
) -> None:
    assume(not newline or min(lengths) >= 3)
    budget = target(model, budget, error)
    tokens = batch_of(lengths, seed, newline)
    done = model.compress(tokens, budget)
    used = done.tokens.mask.sum(1).tolist()
    plan = [usage.used for usage in model.plan(tokens.item_sizes(), budget)]
    assert used == [usage.used for usage in done.tokens.usage]
    for n, bound, native, usage in zip(used, plan, lengths, done.tokens.usage, strict=True):
        assert usage.native == native
        assert n <= usage.cap == bound <= budget.cap(native, native / 10)
        if budget.target_error is None and (model.config.selection_method == "fixed" or bound == native):
            assert n == bound
        if usage.error is not None and budget.target_error is not None:
            assert usage.error <= budget.target_error + 1e-9 or n >= bound - native % 3
    for i, index_map in enumerate(done.maps):
        positions = done.tokens.positions[i][done.tokens.mask[i]].tolist()
        assert positions == sorted(set(positions))
        assert all(0 <= place < lengths[i] for place in positions)
        assert tuple(index_map.shape) == (tokens.grids or ())[i]
        codes = used[i] - (lengths[i] - index_map.numel()) if used[i] else 0
        if codes > 0:
            assert index_map.unique().tolist() == list(range(codes))


@EVERY
def test_a_budget_at_or_above_native_changes_no_bit(model: VQToken) -> None:
    tokens = batch_of([12, 7, 0])
    for budget in (TokenBudget(), TokenBudget(max_tokens=12), TokenBudget(retention=1.0)):
        done = model.compress(tokens, budget)
        for name in ("embeddings", "mask", "positions", "grids"):
            assert getattr(done.tokens, name) is getattr(tokens, name)
        assert [m.flatten().tolist() for m in done.maps] == [list(range(n)) for n in (12, 7, 0)]


@EVERY
@FEW
@given(lengths=LENGTHS, budget=budgets(), error=ERRORS, seed=st.integers(0, 99), left=st.booleans())
def test_a_row_is_the_row_alone(
    model: VQToken, lengths: list[int], budget: TokenBudget, error: float | None, seed: int, left: bool
) -> None:
    budget = target(model, budget, error)
    tokens = batch_of(lengths, seed)
    width = max(lengths) + 3
    embeddings = torch.full((len(lengths), width, 6), torch.nan)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, item in enumerate(tokens.items()):
        place = slice(width - len(item), None) if left else slice(0, len(item))
        embeddings[i, place], mask[i, place] = item, True
    together = model.compress(TokenBatch.from_embeddings(embeddings, mask, tokens.seconds, tokens.grids), budget)
    for i, item in enumerate(tokens.items()):
        alone = model.compress(TokenBatch.from_items([item], [lengths[i] / 10], [(tokens.grids or ())[i]]), budget)
        real, other = together.tokens.mask[i], alone.tokens.mask[0]
        torch.testing.assert_close(
            together.tokens.embeddings[i][real], alone.tokens.embeddings[0][other], rtol=0, atol=1e-5
        )
        assert together.tokens.positions[i][real].tolist() == alone.tokens.positions[0][other].tolist()
        assert torch.equal(together.maps[i], alone.maps[0])
        assert together.tokens.usage[i] == replace(alone.tokens.usage[0], error=together.tokens.usage[i].error)


@EVERY
def test_is_a_reducer_that_honors_what_it_says(model: VQToken) -> None:
    reducer: TokenReducer = model
    assert reducer.support.training_free
    assert not reducer.support.nested
    tokens = batch_of([12])
    with pytest.raises(BudgetError, match="unknown duration"):
        model.reduce(replace(tokens, seconds=None), TokenBudget(tokens_per_second=4.0))
    assert [usage.used for usage in model.plan([ItemSize(native=12, seconds=1.2)], "4/s")] == [4]
    with pytest.raises(BudgetError, match="min_tokens"):
        model.reduce(tokens, TokenBudget(retention=0.05))
    tokens.embeddings[0, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"items \[0\]"):
        model.reduce(tokens, TokenBudget(max_tokens=4))


@pytest.mark.parametrize("model", [ELBOW, SILHOUETTE, RELEASED], ids=["elbow", "silhouette", "released"])
def test_a_target_error_and_another_rule_do_not_mix(model: VQToken) -> None:
    with pytest.raises(BudgetError, match="target_error"):
        model.reduce(batch_of([12]), TokenBudget(target_error=0.1))


def test_a_smaller_target_error_never_takes_fewer_tokens() -> None:
    tokens = TokenBatch.from_items([mixture(12, 60, spread=0.4)[0]])
    used = [MEAN.reduce(tokens, TokenBudget(target_error=e)).usage[0].used for e in (1.0, 0.5, 0.2, 0.1)]
    assert used == sorted(used)
    assert used[0] == 1
    assert used[-1] > 10
    assert MEAN.plan([5000], "e0.5")[0].used == 256
    assert MEAN.reduce(tokens, TokenBudget(target_error=1.0, min_tokens=5)).usage[0].used == 5


@EVERY
def test_no_global_randomness_and_the_same_bits(model: VQToken) -> None:
    tokens, budget = batch_of([30, 21]), TokenBudget(max_tokens=6)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = model.reduce(tokens, budget)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(model.reduce(tokens, budget).embeddings, first.embeddings)


@pytest.mark.parametrize("model", [MEAN, MEDOID], ids=["mean", "medoid"])
def test_codes_are_means_or_members_at_their_own_scale(model: VQToken) -> None:
    tokens = batch_of([27])
    x = 40 * tokens.embeddings[0]
    done = model.compress(replace(tokens, embeddings=x[None]), TokenBudget(max_tokens=5))
    labels, sizes = done.maps[0].flatten(), done.tokens.sizes
    assert sizes is not None
    assert sizes[0].tolist() == torch.bincount(labels).tolist()
    for k, code in enumerate(done.tokens.items()[0]):
        if model is MEAN:
            torch.testing.assert_close(code, x[labels == k].mean(0))
        else:
            place = int(done.tokens.positions[0, k])
            assert labels[place] == k
            assert torch.equal(code, x[place])


def test_a_constructed_model_is_in_evaluation_mode_until_it_is_trained() -> None:
    torch.manual_seed(0)
    attention = AttentionConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_patches=6)
    tokens = TokenBatch.from_items([noise(0, 24, 16)], grids=[(4, 2, 3)])
    model = VQToken(VQTokenConfig(compat="released", attention=attention))
    assert not any(part.training for part in model.modules())
    first, second = (model.compress(tokens, 8).tokens.embeddings for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(model.compress(tokens, 8).tokens.embeddings, first), "dropout"


def test_a_plan_needs_native_tokens_or_the_grid_of_tokens() -> None:
    sizes = [ItemSize(native=40), ItemSize(frames=4, height=2, width=5), ItemSize(native=40, seconds=2.0)]
    assert [usage.used for usage in MEAN.plan(sizes, "25%")] == [10, 10, 10]
    assert MEAN.plan([40])[0] == MEAN.plan([ItemSize(native=40)], None)[0]
    with pytest.raises(BudgetError, match="width"):
        MEAN.plan([ItemSize(frames=4, height=2)], 8)
    attention = AttentionConfig(hidden_size=6, num_attention_heads=2, num_patches=3)
    published = VQToken(VQTokenConfig(compat="released", attention=attention))
    clip = ItemSize(native=31, frames=10, height=1, width=3)
    with pytest.raises(BudgetError, match="9 tokens for 10 frames.*nearest legal value: 11"):
        published.plan([clip], 9)
    assert published.plan([clip], 11)[0].used == 11


@EVERY
def test_every_clip_may_have_a_budget_of_its_own(model: VQToken) -> None:
    lengths = [24, 30, 12, 9]
    limits: list[BudgetLike] = [5, {"retention": 0.25}, None, "4/s,3"]
    if "target_error" in model.support.fields:
        limits[0] = "12,e0.4"
    tokens = batch_of(lengths)
    together = model.compress(tokens, limits)
    for i, limit in enumerate(limits):
        alone = model.compress(tokens.select([i]), limit)
        assert together.tokens.usage[i] == replace(alone.tokens.usage[0], error=together.tokens.usage[i].error)
        assert torch.equal(together.maps[i], alone.maps[0])
        torch.testing.assert_close(together.tokens.items()[i], alone.tokens.items()[0], rtol=0, atol=1e-6)
    assert torch.equal(together.tokens.items()[2], tokens.items()[2]), "without ceilings a clip stays whole"
    with pytest.raises(ValueError, match="4 items but 2 budgets"):
        model.compress(tokens, [5, 6])


@pytest.mark.parametrize("budget", [4, "4", "25%", {"max_tokens": 4}, TokenBudget(max_tokens=4)])
def test_a_budget_in_any_form(budget: Any) -> None:
    assert MEAN.reduce(batch_of([16]), budget).usage[0].used == 4


def test_a_newline_after_the_frames_stays_if_there_is_room() -> None:
    tokens = batch_of([13], newline=True)
    newline = tokens.embeddings[0, 12]
    done = MEAN.compress(tokens, TokenBudget(max_tokens=5))
    assert torch.equal(done.tokens.embeddings[0, 4], newline)
    assert done.tokens.positions[0, 4] == 12
    assert done.tokens.grids is None
    assert done.maps[0].unique().tolist() == [0, 1, 2, 3]
    assert MEAN.reduce(tokens, TokenBudget(max_tokens=1)).positions.max() < 12


def test_tokens_that_were_merged_before_weigh_more() -> None:
    tokens = batch_of([24])
    twice = MEAN.reduce(AveragePooling().reduce(tokens, TokenBudget(max_tokens=12)), TokenBudget(max_tokens=3))
    assert twice.sizes is not None
    assert twice.sizes.sum() == 24
    mean = (twice.embeddings[0] * twice.sizes[0, :, None]).sum(0) / 24
    torch.testing.assert_close(mean, tokens.embeddings[0].mean(0), rtol=1e-4, atol=1e-5)


@EVERY
def test_a_gradient_reaches_the_tokens(model: VQToken) -> None:
    tokens = batch_of([18, 9])
    leaf = tokens.embeddings.clone().requires_grad_()
    model(replace(tokens, embeddings=leaf), TokenBudget(max_tokens=4)).embeddings.square().sum().backward()
    assert leaf.grad is not None
    reached = (leaf.grad != 0).any(2)
    if model is MEDOID:
        assert reached.sum() == 8
    else:
        assert torch.equal(reached, tokens.mask)


@pytest.mark.parametrize("model", [MEAN, MEDOID, RELEASED], ids=["mean", "medoid", "released"])
def test_half_precision_stays_half(model: VQToken) -> None:
    tokens = batch_of([30])
    half = model.reduce(replace(tokens, embeddings=tokens.embeddings.bfloat16()), TokenBudget(max_tokens=5))
    assert half.embeddings.dtype == torch.bfloat16
    whole = model.reduce(replace(tokens, embeddings=tokens.embeddings.bfloat16().float()), TokenBudget(max_tokens=5))
    torch.testing.assert_close(half.embeddings.float(), whole.embeddings, rtol=1e-2, atol=1e-2)


def test_grids_that_do_not_fit_are_named() -> None:
    tokens = batch_of([12])
    with pytest.raises(ValueError, match="5 x 1 x 3 cells for 12 tokens"):
        MEAN.reduce(replace(tokens, grids=((5, 1, 3),)), TokenBudget(max_tokens=4))


def test_a_model_without_weights_is_saved_and_described(tmp_path: Path) -> None:
    MEDOID.save_pretrained(tmp_path / "model")
    loaded = VQToken.from_pretrained(tmp_path / "model")
    assert loaded.config == MEDOID.config
    text = describe(str(tmp_path / "model"))
    assert "parameters  0 in 0 tensors" in text
    assert "training free" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_clusters": 0},
        {"min_clusters": 9, "max_clusters": 8},
        {"max_iterations": 0},
        {"compat": "released", "code_type": "medoid"},
    ],
)
def test_impossible_configurations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        VQTokenConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [MEAN, MEDOID], ids=["mean", "medoid"])
def test_in_a_live_language_model(model: VQToken) -> None:
    language = shared("llava_onevision")
    inputs = encode(language, [[5, Clip(1), 6], [7, Picture(2), 8, 9]])
    with torch.no_grad():
        before = language(**inputs).logits
        with attach(language, model, TokenBudget(max_tokens=6)) as handle:
            language(**inputs)
            assert [usage.used for usage in handle.usage] == [6]  # the clip; the picture stays as it is
            assert language.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2
        assert torch.equal(language(**inputs).logits, before)
