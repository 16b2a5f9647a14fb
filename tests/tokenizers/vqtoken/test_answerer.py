"""VideoAnswerer: the contract of models, budgets, baselines; questions and clips do not influence each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.model_contract import ModelContract, Outputs
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.budget import BudgetError, ItemSize, TokenBudget
from tokenthrift.config import ConfigError
from tokenthrift.models import describe
from tokenthrift.padding import pad_rows
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VideoAnswerer
from tokenthrift.vqtoken.evaluation.baselines import BASELINES, FramePooling, baseline
from tokenthrift.vqtoken.evaluation.flops import Stopwatch, count_flops
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig, position_code
from tokenthrift.vqtoken.synthetic.questions import WORDS, encode_text

TEXTS = ["which way did the red circle move ?", "how many things moved ?", "where did the T end ?"]


def clip(seed: int) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def words(texts: list[str], count: int) -> Tensor:
    out = torch.zeros(count, 13, dtype=torch.long)
    for row, text in zip(out, texts, strict=False):
        row[: len(encode_text(text))] = torch.tensor(encode_text(text))
    return out


class TestVideoAnswerer(ModelContract):
    learning_rate = 1e-2

    def build(self) -> VideoAnswerer:
        return tiny_answerer()

    def items(self) -> list[Any]:
        return [(clip(0), TEXTS[:1]), (clip(1), TEXTS), (clip(2), TEXTS[1:])]

    def scores(self, model: VideoAnswerer, items: list[Any]) -> Tensor:
        tokens = model.encode(torch.stack([frames for frames, _ in items]))
        most = max(len(texts) for _, texts in items)
        questions = torch.stack([words(texts, most) for _, texts in items])
        return model.score(model.prefill(model.vqtoken.reduce(tokens, TokenBudget(max_tokens=9))), questions)

    def outputs(self, model: VideoAnswerer, items: list[Any]) -> Outputs:
        scores = self.scores(model, items)
        return [[row[: len(texts)]] for row, (_, texts) in zip(scores, items, strict=True)]

    def shapes(self, model: VideoAnswerer, item: Any) -> list[tuple[int, ...]]:
        return [(len(item[1]), len(WORDS))]

    def loss(self, model: VideoAnswerer, items: list[Any]) -> Tensor:
        scores = self.scores(model, items)
        answers = torch.arange(scores.shape[0] * scores.shape[1])
        return cross_entropy(scores.flatten(0, 1), answers)


@pytest.fixture(scope="module")
def model() -> VideoAnswerer:
    return tiny_answerer()


@pytest.mark.parametrize("budget", [5, "25%", "6.5/s", "8,e0.3"])
def test_answers_cost_what_was_planned(model: VideoAnswerer, budget: str | int) -> None:
    clips = torch.stack([clip(0), clip(1)])
    planned = model.plan([ItemSize(frames=4)] * 2, budget)
    answers = model.answer(clips, [TEXTS, TEXTS[:1]], budget)
    assert [len(row) for row in answers] == [3, 1]
    for row, usage in zip(answers, planned, strict=True):
        for answer in row:
            assert answer.word in WORDS
            assert 0 < answer.confidence <= 1
            assert answer.usage.used <= usage.used < answer.usage.native == 64


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_stand_in(model: VideoAnswerer, name: str) -> None:
    reducer = baseline(name, model.config.grid)
    (answers,) = model.answer(clip(0)[None], [TEXTS], 8, reducer)
    assert answers[0].usage.used == 8
    tokens = reducer.reduce(model.encode(clip(0)[None]), TokenBudget(max_tokens=8))
    assert (tokens.positions[0].diff() > 0).all()


def test_questions_about_a_clip_do_not_see_each_other(model: VideoAnswerer) -> None:
    tokens = model.encode(clip(0)[None])
    with torch.no_grad():
        together = model(tokens, words(TEXTS, 3)[None])[0]
        for row, text in zip(together, TEXTS, strict=True):
            torch.testing.assert_close(model(tokens, words([text], 1)[None])[0, 0], row, rtol=0, atol=1e-5)


def test_padding_on_either_side_is_not_read(model: VideoAnswerer) -> None:
    native = model.encode(clip(0)[None])
    questions = words(TEXTS, 3)[None]
    junk = torch.full((1, 3, native.embeddings.shape[2]), float("nan"))
    embeddings = torch.cat([junk, native.embeddings, junk], 1)
    mask = torch.cat([native.mask[:, :3] & False, native.mask, native.mask[:, :3] & False], 1)
    with torch.no_grad():
        expected = model(native, questions)
        padded = model(TokenBatch.from_embeddings(embeddings, mask), questions)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_clips_of_unequal_counts_equal_each_alone_with_nan_in_the_padding(model: VideoAnswerer, side: Any) -> None:
    native = model.encode(torch.stack([clip(0), clip(1), clip(2)]))
    reduced = model.vqtoken.reduce(native, [5, "100%", 17])
    rows, sizes = reduced.items(), [row[real] for row, real in zip(reduced.sizes, reduced.mask, strict=True)]  # type: ignore[arg-type]
    positions = [row[real] for row, real in zip(reduced.positions, reduced.mask, strict=True)]
    embeddings, mask = pad_rows(rows, side=side, value=math.nan)
    batch = TokenBatch(
        embeddings=embeddings,
        mask=mask,
        positions=pad_rows(positions, side=side, value=-1)[0],
        sizes=pad_rows(sizes, side=side)[0],
        usage=reduced.usage,
    )
    questions = words(TEXTS, 3)[None].expand(3, -1, -1)
    with torch.no_grad():
        together = model(batch, questions)
        for i in range(3):
            alone = model(reduced.select([i]).first(len(rows[i])), questions[:1])
            torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-5)


def test_a_clip_read_once_answers_any_number_of_times(model: VideoAnswerer) -> None:
    clips, questions = model.prefill(model.encode(clip(0)[None])), words(TEXTS, 3)[None]
    with torch.no_grad():
        assert torch.equal(model.score(clips, questions), model.score(clips, questions))
        assert torch.equal(model.score(clips, questions), model.ask(clips, questions))


def test_it_plans_clips_by_their_frames(model: VideoAnswerer) -> None:
    assert model.plan([ItemSize(frames=4)])[0].used == 64
    assert model.plan([ItemSize(frames=300, seconds=2.0)], "6/s")[0].used == 12, "it reads 4 of the frames"
    assert model.plan([64, ItemSize(native=64)], [5, "50%"]) == (*model.plan([64], 5), *model.plan([64], "50%"))
    assert model.native_cost.per_frame == 16
    with pytest.raises(BudgetError, match="frames"):
        model.plan([ItemSize(seconds=2.0)], 5)
    answers = model.answer(torch.stack([clip(0), clip(1)]), [TEXTS, TEXTS], [5, {"max_tokens": 9}])
    assert [row[0].usage.used for row in answers] == [5, 9]
    assert not any(part.training for part in VideoAnswerer(model.config).modules())


def test_an_earlier_token_does_not_see_a_later_one(model: VideoAnswerer) -> None:
    native = model.encode(clip(0)[None])
    few = TokenBatch.from_embeddings(native.embeddings[:, :40])
    with torch.no_grad():
        whole, part = model.prefill(native).cache, model.prefill(few).cache
    for long, short in zip(whole.layers, part.layers, strict=True):
        torch.testing.assert_close(long.values[:, :, :40], short.values, rtol=0, atol=1e-5)


def test_bytes_and_floats_are_the_same_clip(model: VideoAnswerer) -> None:
    pixels = (clip(0)[None] * 255).to(torch.uint8)
    one, other = model.encode(pixels), model.encode(pixels / 255)
    torch.testing.assert_close(one.embeddings, other.embeddings)
    assert one.grids == ((4, 4, 4),)
    assert one.seconds == (1.0,)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.rand(1, 3, 3, 16, 16), "expected clips"),
        (torch.rand(4, 3, 16, 16), "expected clips"),
        (torch.full((1, 4, 3, 16, 16), float("nan")), "NaN"),
        (torch.full((1, 4, 3, 16, 16), 255.0), r"lie in \[0, 1\]"),
    ],
)
def test_bad_clips_are_refused(model: VideoAnswerer, clips: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode(clips)


def test_bad_questions_and_budgets_are_refused(model: VideoAnswerer) -> None:
    with pytest.raises(ValueError, match="2 clips but questions for 1"):
        model.answer(torch.stack([clip(0), clip(1)]), [TEXTS])
    with pytest.raises(ValueError, match="unknown words"):
        model.answer(clip(0)[None], [["who was it ?"]])
    with pytest.raises(BudgetError):
        model.answer(clip(0)[None], [TEXTS], "8,8")
    assert model.answer(clip(0)[None], [[]]) == [[]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 7},
        {"token_dim": 24},
        {"num_attention_heads": 5},
        {"num_frames": 0},
        {"vocabulary": ["yes", "no"]},
        {"position_weight": 0.0},
        {"token_dim": 200},
    ],
)
def test_bad_configurations_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AnswererConfig(**wrong)


def test_info_shows_it(model: VideoAnswerer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m", dtype=torch.float16)
    text = describe(str(tmp_path / "m"))
    assert "vqtoken_answerer" in text
    assert "max_tokens" in text


def test_codes_of_places_are_different_and_of_length_one() -> None:
    codes = position_code((8, 8, 8))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(512))
    assert (codes @ codes.T - 2 * torch.eye(512)).max() < 0.999


def test_pooled_frames_are_means_of_blocks() -> None:
    values = torch.arange(64.0).reshape(1, 64, 1)
    tokens = TokenBatch.from_embeddings(values)
    done = FramePooling((4, 4, 4)).reduce(tokens, TokenBudget(max_tokens=16))
    blocks = values.reshape(4, 2, 2, 2, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(done.embeddings[0, :, 0], blocks)
    assert done.sizes is not None
    assert done.sizes.tolist() == [[4.0] * 16]
    assert done.positions[0, :5].tolist() == [0, 2, 8, 10, 16]
    assert FramePooling((4, 4, 4)).plan([64], 15)[0].used == 8
    with pytest.raises(ValueError, match="grid"):
        FramePooling((4, 4, 4)).reduce(TokenBatch.from_embeddings(values[:, :32]), TokenBudget(max_tokens=16))
    with pytest.raises(ValueError, match="no baseline"):
        baseline("best", (4, 4, 4))


def test_operations_count_products_and_attention() -> None:
    a, b = torch.rand(3, 4), torch.rand(4, 5)
    result, count = count_flops(lambda: a @ b)
    assert torch.equal(result, a @ b)
    assert count == 2 * 3 * 4 * 5
    q = torch.rand(1, 2, 6, 8)
    _, count = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert count == 2 * (2 * 2 * 6 * 6 * 8)
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("step"):
            pass
    assert list(watch.seconds) == ["step"]
    assert watch.seconds["step"] >= 0
