"""What every sampler keeps whatever the model says: it ends, leaves the given tokens alone, and keeps rows apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.backbones.samplers import (
    Canvas,
    DaedalSampler,
    DiffuSpec,
    DreamSampler,
    EntropyBoundSampler,
    FastDllmSampler,
    LladaSampler,
    OnePathSampler,
    PriorGuidedSampler,
    Sampler,
    TokenIds,
    Trace,
    sample,
    sample_ragged,
)

VOCAB, EOS, MASK = 9, 7, 8
TOKENS = TokenIds(MASK, EOS, eot=6)
MOST = 40  # slots that a growing response may reach

SAMPLERS: dict[str, Sampler] = {
    "llada": LladaSampler(steps=7, block_length=4),
    "llada released": LladaSampler(steps=8, compat="released"),
    "llada random": LladaSampler(steps=5, remasking="random", temperature=1.0),
    "llada guided": LladaSampler(steps=5, guidance=1.5, confidence_eos_eot_inf=True),
    "threshold": FastDllmSampler(block_length=3),
    "threshold released": FastDllmSampler(compat="released"),
    "row threshold": FastDllmSampler(rule="row_threshold", block_length=5),
    "factor": FastDllmSampler(rule="factor", block_length=4),
    "factor released": FastDllmSampler(rule="factor", compat="released", block_length=4),
    "quota": FastDllmSampler(rule="quota", steps=3),
    "quota released": FastDllmSampler(rule="quota", steps=4, compat="released", block_length=4),
    "single": FastDllmSampler(rule="single", block_length=2),
    "dream": DreamSampler(steps=4, remasking="entropy"),
    "dream origin": DreamSampler(steps=4, order="origin"),
    "dream noisy": DreamSampler(steps=4, remasking="margin", order_temperature=0.5),
    "entropy bound": EntropyBoundSampler(block_length=6),
    "entropy bound decay": EntropyBoundSampler(position_decay=0.2),
    "prior": PriorGuidedSampler(verify_threshold=0.2),
    "prior in blocks": PriorGuidedSampler(verify_threshold=0.2, verify_committed=True, block_length=3),
    "prior released": PriorGuidedSampler(compat="released", block_length=4),
    "one path": OnePathSampler(),
    "one path with a proxy": OnePathSampler(
        options=DiffuSpec(beam=2), proxy=lambda text, token: -abs(text[-1] - token)
    ),
    "daedal": DaedalSampler(max_length=MOST, block_length=4, eos_window=4),
    "daedal released": DaedalSampler(max_length=MOST, block_length=4, eos_window=4, compat="released"),
    "daedal guided": DaedalSampler(max_length=MOST, block_length=4, eos_window=4, guidance=1.0, temperature=0.5),
    "daedal repair": DaedalSampler(max_length=MOST, grow=False, drafts=True, expansion=2, block_length=4),
}


def model(seed: int, wild: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A model of no sense: logits follow from a row's own tokens, sometimes all MASK, all EOS, NaN or level."""
    table = torch.randn(VOCAB, 50, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del rows
        logits = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
        for at, row in enumerate(ids):
            real = mask[at].nonzero().squeeze(1)
            place = torch.arange(len(real))
            own = table[row[real], place % 50]
            logits[at, real] = own + own.roll(1, 0) / 2
        if wild == "mask":
            logits[..., MASK] += 50
        elif wild == "eos":
            logits[..., EOS] += 50
        elif wild == "nan":
            logits[:, ::2] = torch.nan
        elif wild == "level":
            logits[:] = 0
        return logits

    return predict


def canvas_of(seed: int, lengths: list[int]) -> Canvas:
    """A prompt of three tokens and responses of which about a third is a draft."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(0, 6, (len(lengths), 3 + width), generator=generator)
    undecided = torch.rand(ids.shape, generator=generator) < 0.7
    undecided[:, :3] = False
    mask = torch.arange(3 + width) < torch.tensor(lengths)[:, None] + 3
    return Canvas(ids.masked_fill(undecided, MASK), mask, 3)


def own_generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(count)]


@pytest.mark.parametrize("name", SAMPLERS)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6), wild=st.sampled_from(["", "mask", "eos", "nan", "level"]))
@example(seed=5985, wild="")  # an end before the present block, and a slot opened again before the end
def test_it_ends_and_leaves_no_slot_open(name: str, seed: int, wild: str) -> None:
    sampler, canvas, trace = SAMPLERS[name], canvas_of(seed, [8, 8]), Trace()
    before = canvas.ids.clone()
    state = torch.get_rng_state()

    def count(*call: object) -> None:
        trace(*call)  # type: ignore[arg-type]
        assert len(trace.calls) <= 2 * MOST + 10, "it does not end"

    done = sample(model(seed, wild), canvas, sampler, TOKENS, trace=count)
    assert torch.equal(canvas.ids, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert done.forwards == len(trace.calls)
    assert torch.equal(done.ids[:, :3], before[:, :3])
    assert (done.lengths <= MOST).all()
    if name != "llada released":  # which counts MASK as a token
        assert not (done.ids[done.mask] == MASK).any()
    if "prior" not in name and "daedal" not in name and "path" not in name:
        assert torch.equal(done.ids[:, : before.shape[1]][before != MASK], before[before != MASK])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "llada released"])
def test_a_prompt_with_a_mask_in_it_leaves_no_slot_open(name: str) -> None:
    """As where a text is filled in: what the prompt leaves open takes its part of a quota too."""
    canvas = canvas_of(0, [8, 5])
    ids = canvas.ids.clone()
    ids[:, 1] = MASK
    done = sample(model(0, ""), Canvas(ids, canvas.mask, canvas.start), SAMPLERS[name], TOKENS)
    assert not (done.ids[:, 3:][done.mask[:, 3:]] == MASK).any()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("most", [1, 3])
def test_a_ceiling_on_rounds_commits_what_is_open(name: str, most: int) -> None:
    canvas = canvas_of(3, [8, 8])
    done = sample(model(3, "mask"), canvas, SAMPLERS[name], TOKENS, max_rounds=most)
    assert done.forwards <= most
    assert (done.rounds <= most).all()
    assert not (done.ids[done.mask] == MASK).any()
    with pytest.raises(ValueError, match="at least 1"):
        sample(model(3, ""), canvas, SAMPLERS[name], TOKENS, max_rounds=0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "released" not in name and name != "daedal guided"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_of_a_batch_equals_the_row_alone(name: str, seed: int) -> None:
    lengths = [8, 3, 11, 1]
    canvas, predict = canvas_of(seed, lengths), model(seed, "")
    together = sample(predict, canvas, SAMPLERS[name], TOKENS, generators=own_generators(4))
    for row, length in enumerate(lengths):
        here = (slice(row, row + 1), slice(0, 3 + length))
        alone = Canvas(canvas.ids[here], canvas.mask[here], 3)
        generators = own_generators(4)[row : row + 1]
        one = sample(predict, alone, SAMPLERS[name], TOKENS, generators=generators)
        assert one.responses() == together.responses()[row : row + 1], row
        assert int(one.rounds[0]) == int(together.rounds[row]), row


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("most", [None, 2])
def test_an_utterance_leaves_a_ragged_batch_when_it_is_done_and_the_next_one_enters(
    name: str, most: int | None
) -> None:
    lengths, predict = [8, 3, 11, 1, 5, 9, 2], model(1, "")
    whole = canvas_of(1, lengths)
    canvases = [
        Canvas(whole.ids[row : row + 1, : 3 + length], whole.mask[row : row + 1, : 3 + length], 3)
        for row, length in enumerate(lengths)
    ]
    trace = Trace()
    done = sample_ragged(predict, canvases, SAMPLERS[name], TOKENS, max_rows=3, max_rounds=most, trace=trace)
    alone = [sample(predict, canvas, SAMPLERS[name], TOKENS, max_rounds=most) for canvas in canvases]
    for one, other in zip(done, alone, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.rounds, other.rounds)
        assert torch.equal(one.confidence.nan_to_num(-1), other.confidence.nan_to_num(-1))
    read = [call.rows.unique().tolist() for call in trace.calls]
    assert max(map(len, read)) == 3
    calls = [one.forwards for one in alone]
    assert [sum(row in rows for rows in read) for row in range(7)] == calls, "nobody is read after the end"
    last = next(at for at, rows in enumerate(read) if 6 in rows)
    assert all(len(rows) == 3 for rows in read[:last]), "a row is free only where nobody waits for it"


def test_ragged_batches_refuse_what_utterances_do_not_share() -> None:
    canvas = canvas_of(0, [4, 2])
    with pytest.raises(ValueError, match="of one row"):
        sample_ragged(model(0, ""), [canvas], PriorGuidedSampler(), TOKENS, max_rows=2)
    one = Canvas(canvas.ids[:1], canvas.mask[:1], 3)
    with pytest.raises(ValueError, match="at least 1"):
        sample_ragged(model(0, ""), [one], PriorGuidedSampler(), TOKENS, max_rows=0)
    with pytest.raises(TypeError, match="cache='none'"):
        sample_ragged(model(0, ""), [one], FastDllmSampler(cache="dual"), TOKENS, max_rows=1)
    assert sample_ragged(model(0, ""), [], PriorGuidedSampler(), TOKENS, max_rows=1) == []


def test_a_draft_that_is_too_short_gets_slots_where_the_model_doubts_it() -> None:
    text = [0, 1, 2, 3, 4, 5]

    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del rows
        # Sure of the right token in each place of the text, and of the end after it.
        logits = torch.full((*ids.shape, VOCAB), -5.0)
        for slot in range(ids.shape[1]):
            logits[:, slot, text[slot] if slot < len(text) else EOS] = 5.0
        return logits.masked_fill(~mask[..., None], 0.0)

    short = torch.tensor([[0, 1, 4, 5]])  # 2 and 3 are missing
    canvas = Canvas(short, torch.ones_like(short, dtype=torch.bool))
    plain = sample(predict, canvas, DaedalSampler(grow=False), TOKENS)
    assert plain.responses() == [[0, 1, 4, 5]]
    assert plain.forwards == 0
    repaired = sample(predict, canvas, DaedalSampler(grow=False, drafts=True, expansion=3), TOKENS)
    assert repaired.responses()[0][:6] == text
    tight = sample(predict, canvas, DaedalSampler(grow=False, drafts=True, expansion=3, max_length=5), TOKENS)
    assert len(tight.responses()[0]) == 5
    assert tight.responses()[0][:4] == text[:4]


def test_a_proxy_changes_the_path_where_the_model_is_undecided() -> None:
    logits = torch.full((1, 3, VOCAB), -9.0, dtype=torch.float64)
    logits[0, 0, 1] = 5.0
    logits[0, 1, [2, 5]] = torch.tensor([1.1, 1.0], dtype=torch.float64)
    logits[0, 2, 4] = 5.0
    canvas = Canvas(torch.tensor([[MASK, MASK, 4]]), torch.ones(1, 3, dtype=torch.bool))
    plain = sample(lambda *call: logits, canvas, OnePathSampler(), TOKENS)
    assert plain.responses() == [[1, 2, 4]]
    assert plain.forwards == 1

    def likes_five(text: Sequence[int], token: int) -> float:
        return 0.0 if token == 5 or len(text) != 1 else -3.0

    assert sample(lambda *call: logits, canvas, OnePathSampler(proxy=likes_five), TOKENS).responses() == [[1, 5, 4]]


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="single"):
        FastDllmSampler(threshold=1.5)
    with pytest.raises(ValueError, match="come out even"):
        sample(model(0, ""), canvas_of(0, [8]), LladaSampler(steps=7, block_length=4, compat="released"), TOKENS)
    with pytest.raises(ValueError, match="verify"):
        PriorGuidedSampler(verify_committed=True)
    with pytest.raises(ValueError, match="max_length"):
        sample(model(0, ""), canvas_of(0, [8]), DaedalSampler(max_length=4), TOKENS)
    with pytest.raises(TypeError, match="within"):
        sample(model(0, ""), canvas_of(0, [8]), FastDllmSampler(cache="dual"), TOKENS)


def test_pruning_counts_from_the_response_and_frees_the_rest() -> None:
    def predict(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        del mask, rows
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[:, :, 1] = 9.0
        logits[:, 6:, EOS] = 20.0
        return logits

    ids = torch.full((1, 11), MASK)
    ids[0, :3] = torch.tensor([2, EOS, 3])  # an EOS in the prompt does not end the response
    canvas = Canvas(ids, torch.ones_like(ids, dtype=torch.bool), 3)
    done = sample(predict, canvas, PriorGuidedSampler(), TOKENS)
    assert done.responses() == [[1, 1, 1]]
    assert done.text_slots() == [[0, 1, 2]]
    kept = sample(predict, canvas, PriorGuidedSampler(prune="never"), TOKENS)
    assert kept.responses() == [[1, 1, 1, *[EOS] * 5]]
    assert kept.text_slots() == [[0, 1, 2]]
