"""The laws of confidence denoising, on a stub whose logits depend on the whole row."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.dllm_asr.plain_denoise import sampled
from tokenthrift.backbones.samplers import Predict, Sampled, TokenIds
from tokenthrift.backbones.samplers.prior_guided import Prune
from tokenthrift.backbones.samplers.rules import by_threshold
from tokenthrift.backbones.samplers.scores import Scoring, score
from tokenthrift.budget import DecodeBudget

VOCAB, MASK, EOS, DELETE = 12, 11, 10, 9


def stub(seed: int, sharpness: float = 6.0) -> tuple[Predict, list[tuple[Tensor, Tensor, Tensor]]]:
    """A model of position, own token and row content, with nothing shared between rows; and a record of its calls."""
    generator = torch.Generator().manual_seed(seed)
    by_slot = torch.randn(64, VOCAB, generator=generator, dtype=torch.float64)
    by_token = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    by_row = torch.randn(8, VOCAB, generator=generator, dtype=torch.float64)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        calls.append((ids.clone(), mask.clone(), rows.clone()))
        content = (by_token[ids] * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        logits = sharpness * (by_slot[: ids.shape[1]] + content + by_row[rows].unsqueeze(1))
        return logits.masked_fill(~mask.unsqueeze(-1), math.nan)

    return predict, calls


def run(
    predict: Predict, ids: Tensor, mask: Tensor, *, rounds: int | None = None, threshold: float = 0.9, **options: Any
) -> Sampled:
    budget = DecodeBudget(max_rounds=rounds, confidence_threshold=threshold)
    return sampled(predict, ids, mask, mask_id=MASK, eos_id=EOS, budget=budget, **options)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows of 0 to 9 slots, each MASK or a draft token; padding holds anything."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    width = max(lengths) + draw(st.integers(0, 3))
    token = st.one_of(st.just(MASK), st.integers(0, VOCAB - 1))
    ids = [[draw(token) for _ in range(width)] for _ in lengths]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.tensor(ids, dtype=torch.int64).reshape(len(lengths), width), mask


MODES = st.fixed_dictionaries(
    {
        "prune": st.sampled_from(["every", "first", "never"]),
        "verify_threshold": st.sampled_from([None, 0.1, 0.7]),
        "verify_committed": st.booleans(),
        "rounds": st.sampled_from([None, 1, 3]),
        "threshold": st.sampled_from([0.3, 0.9, 1.0]),
    }
).map(lambda mode: {**mode, "verify_committed": mode["verify_committed"] and mode["verify_threshold"] is not None})


@settings(deadline=None, max_examples=40)
@given(batches(), MODES, st.integers(0, 5))
def test_a_row_of_a_batch_equals_the_row_alone(batch: tuple[Tensor, Tensor], mode: dict[str, Any], seed: int) -> None:
    ids, mask = batch
    predict, _ = stub(seed)
    together = run(predict, ids, mask, **mode)
    for row in range(len(ids)):
        slots = int(mask[row].sum())

        def alone_predict(i: Tensor, m: Tensor, rows: Tensor, row: int = row) -> Tensor:
            return predict(i, m, rows + row)

        alone = run(alone_predict, ids[row : row + 1, :slots], mask[row : row + 1, :slots], **mode)
        length = int(alone.lengths[0])
        assert int(together.lengths[row]) == length
        assert int(together.rounds[row]) == int(alone.rounds[0])
        assert together.ids[row, :length].tolist() == alone.ids[0, :length].tolist()
        assert text_ids(together)[row][0] == text_ids(alone)[0][0]
        torch.testing.assert_close(
            together.confidence[row, :length], alone.confidence[0, :length], rtol=0, atol=1e-9, equal_nan=True
        )


@settings(deadline=None, max_examples=40)
@given(batches(), MODES, st.integers(0, 5))
def test_laws_of_one_run(batch: tuple[Tensor, Tensor], mode: dict[str, Any], seed: int) -> None:
    ids, mask = batch
    before = ids.clone()
    predict, calls = stub(seed)
    result = run(predict, ids, mask, **mode)
    alive = torch.arange(ids.shape[1]) < result.lengths[:, None]

    assert torch.equal(ids, before)
    assert not (result.ids[alive] == MASK).any()
    assert (result.lengths <= mask.sum(1)).all()
    assert result.forwards == len(calls) == int(result.rounds.max())
    assert sum(len(rows) for _, _, rows in calls) == int(result.rounds.sum())
    slots_to_decide = (mask & (ids == MASK)).sum(1) if mode["verify_threshold"] is None else mask.sum(1)
    if mode["verify_committed"]:  # each is committed at most once more, and a last round finds nothing to change
        slots_to_decide = 2 * mask.sum(1) + 1
    assert (result.rounds <= slots_to_decide).all()
    assert mode["rounds"] is None or result.forwards <= mode["rounds"]
    if mode["verify_threshold"] is None and mode["prune"] == "never":
        draft = mask & (ids != MASK)
        assert torch.equal(result.ids[draft], ids[draft])
    if mode["prune"] == "every":
        assert not (result.ids[alive & (result.rounds > 0)[:, None]] == EOS).any()
    ran = alive & (result.rounds > 0)[:, None]
    assert result.confidence[ran].ge(0).all()
    assert result.confidence[~alive].isnan().all()
    for tokens, confidences in text_ids(result):
        assert EOS not in tokens
        assert len(tokens) == len(confidences)
    # The model only ever sees rows that still have something to decide, cut to the longest of them.
    for call, (_, seen, _) in enumerate(calls):
        assert seen.any(0).all()
        if call and not mode["verify_committed"]:
            assert (calls[call][0].eq(MASK) & seen).any(1).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=16, max_size=16),
    st.floats(0.01, 1.0),
)
def test_commit_takes_the_sure_ones_and_the_surest(
    confidence: list[list[float]], open_slots: list[bool], threshold: float
) -> None:
    c = torch.tensor(confidence, dtype=torch.float64)
    m = torch.tensor(open_slots).reshape(4, 4)[: len(c)]
    chosen = by_threshold(c, m, threshold)
    for row in range(len(c)):
        candidates = [i for i in range(4) if m[row, i]]
        expected = {i for i in candidates if float(c[row, i]) >= threshold}
        if candidates:
            expected.add(max(candidates, key=lambda i: (float(c[row, i]), -i)))
        assert set(chosen[row].nonzero().flatten().tolist()) == expected


def certain(targets: list[int], confidence: list[float]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A model that wants `targets` with the given probabilities, the rest spread evenly, whatever it sees."""

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del mask, rows
        width = ids.shape[1]
        p = torch.tensor(confidence)[:width, None]
        rest = ((1 - p) / (VOCAB - 2)).expand(width, VOCAB).clone()
        rest[:, MASK] = 1e-30
        return rest.scatter(1, torch.tensor(targets)[:width, None], p).log().expand(len(ids), -1, -1)

    return predict


def text_ids(done: Sampled) -> list[tuple[list[int], list[float]]]:
    """Per row, the token ids of its text and their confidences."""
    rows = zip(done.ids.tolist(), done.confidence.tolist(), done.text_slots(), strict=True)
    return [([ids[i] for i in slots], [confidence[i] for i in slots]) for ids, confidence, slots in rows]


def row(*ids: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)


def test_verification_reopens_a_doubtful_draft_token_in_the_first_round() -> None:
    predict = certain([1, 2, 3], [0.95, 0.95, 0.95])
    trusted = run(predict, *row(1, 7, MASK))
    assert text_ids(trusted)[0][0] == [1, 7, 3]
    checked = run(predict, *row(1, 7, MASK), verify_threshold=0.5)
    assert text_ids(checked)[0][0] == [1, 2, 3]
    assert checked.forwards == 1
    torch.testing.assert_close(checked.confidence[0], torch.full((3,), 0.95, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_reopened_slot_is_masked_until_it_is_committed() -> None:
    seen: list[list[int]] = []
    wanted = certain([1, 2, 3], [0.95, 0.6, 0.7])

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return wanted(ids, mask, rows)

    result = run(predict, *row(1, 7, 8), verify_threshold=0.5)
    assert seen == [[1, 7, 8], [1, MASK, 3]]
    assert text_ids(result)[0][0] == [1, 2, 3]


def test_a_full_draft_needs_a_round_only_to_be_verified() -> None:
    predict = certain([1, 2, 3], [0.95, 0.95, 0.95])
    trusted = run(predict, *row(1, 2, 3))
    assert (trusted.forwards, trusted.confidence.isnan().all().item()) == (0, True)
    checked = run(predict, *row(1, 2, 3), verify_threshold=0.5)
    assert (checked.forwards, text_ids(checked)[0][0]) == (1, [1, 2, 3])


def test_rechecking_opens_one_of_two_tokens_that_were_committed_together_and_do_not_fit() -> None:
    """Beside a 2 the model wants a 3, but both slots are as sure of their 2 while neither sees the other."""

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        second = 3 if ids[0, 0] == 2 else 2
        return certain([2, second], [0.95, 0.95])(ids, mask, rows)

    once = run(predict, *row(MASK, MASK), verify_threshold=0.5)
    assert (text_ids(once)[0][0], once.forwards) == ([2, 2], 1)
    again = run(predict, *row(MASK, MASK), verify_threshold=0.5, verify_committed=True)
    assert (text_ids(again)[0][0], again.forwards) == ([2, 3], 3)  # the last round finds nothing to change
    capped = run(predict, *row(MASK, MASK), verify_threshold=0.5, verify_committed=True, rounds=2)
    assert (text_ids(capped)[0][0], capped.forwards) == ([2, 3], 2)


@pytest.mark.parametrize(("prune", "forwards"), [("every", 3), ("first", 4), ("never", 4)])
def test_an_eos_committed_late_ends_the_work_only_when_pruning_every_round(prune: Prune, forwards: int) -> None:
    # Order of commits: slot 0 (sure), then EOS at slot 2, then slot 1, then slot 3.
    predict = certain([1, 2, EOS, 4], [0.95, 0.6, 0.8, 0.5])
    result = run(predict, *row(MASK, MASK, MASK, MASK), prune=prune)
    assert result.forwards == forwards
    assert text_ids(result)[0][0] == [1, 2]


def test_max_rounds_commits_what_is_left() -> None:
    predict = certain([1, 2, 3, 4], [0.4, 0.3, 0.6, 0.5])
    assert run(predict, *row(MASK, MASK, MASK, MASK)).forwards == 4
    hurried = run(predict, *row(MASK, MASK, MASK, MASK), rounds=2)
    assert hurried.forwards == 2
    assert text_ids(hurried)[0][0] == [1, 2, 3, 4]
    torch.testing.assert_close(hurried.confidence[0, 0].item(), 0.4, rtol=1e-5, atol=0)


def test_deletions_leave_no_text_but_stay_visible_to_the_model() -> None:
    predict = certain([1, DELETE, 3], [0.95, 0.95, 0.4])
    seen: list[list[int]] = []

    def watched(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return predict(ids, mask, rows)

    result = run(watched, *row(MASK, MASK, MASK), delete_id=DELETE)
    assert seen[1] == [1, DELETE, MASK]
    tokens, confidences = text_ids(result)[0]
    assert tokens == [1, 3]
    assert confidences[1] == pytest.approx(0.4, rel=1e-5)


def test_mask_is_never_written_even_where_the_model_prefers_it() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK], logits[0, 4] = 9.0, 1.0
    token, confidence = score(logits, TokenIds(MASK, EOS), Scoring())
    assert token.item() == 4
    assert confidence.item() == pytest.approx(math.e / (math.e + VOCAB - 2))
    assert logits[0, MASK] == 9.0


def test_confidences_that_half_precision_would_round_to_one_keep_their_order() -> None:
    logits = torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    logits[0, 3], logits[1, 3] = 20.0, 21.0
    _, confidence = score(logits, TokenIds(MASK, EOS), Scoring())
    assert confidence[0] < confidence[1] < 1


def test_nothing_to_decide_asks_nothing() -> None:
    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("called without a slot to decide")

    result = run(predict, torch.full((2, 3), MASK), torch.zeros(2, 3, dtype=torch.bool), verify_threshold=0.5)
    assert text_ids(result) == [([], []), ([], [])]
    assert result.rounds.tolist() == [0, 0]
    empty = run(predict, torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
    assert text_ids(empty) == []
