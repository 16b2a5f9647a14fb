"""Certified decoding writes the greedy text, whatever the draft and the model; few passes where the draft is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_dllm import speech, tiny_model, vocabulary
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.budget import BudgetError, DecodeBudget
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.certify import (
    Certification,
    Certified,
    CertifyOptions,
    Draft,
    Spelling,
    certify_together,
    check_beams,
)
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.reading import BatchReader, CausalReader, causal_readers, check_causal

VOCAB, END, START, MASK = 7, 4, 5, 6
FORBIDDEN = (START, MASK)


def word(token: int) -> str:
    """A word of four letters for each token, and for what is no token at all; two have no letter in common."""
    return chr(0x200 + max(-8, min(token, 5000))) * 4


def draft_of(ids: Sequence[int], sure: float | None = None, size: int = 1) -> Draft:
    """Tokens as a text, `size` of them a word."""
    words = ["".join(map(word, ids[at : at + size])) for at in range(0, len(ids), size)]
    return Draft(words, () if sure is None else [sure] * len(words))


WORDS = Spelling(
    piece=lambda token: "" if token == END else f" {word(token)}",
    tokens=lambda text: [ord(character) - 0x200 for character in text.strip()[::4]],
)


def certify(reader: CausalReader, drafts: Sequence[Draft], spelling: Spelling, **options: Any) -> Certified:
    """The greedy text of one recording."""
    return certify_together([Certification(reader, drafts, spelling, **options)], BatchReader(), 1)[0]


class Toy:
    """A causal model over a few tokens: what follows depends on the last two and on how many there are."""

    vocab_size = VOCAB
    begin = [START]

    def __init__(self, seed: int, positions: int = 40, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.last = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.before = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64) * sharpness
        self.position = torch.randn(positions, VOCAB, generator=generator, dtype=torch.float64)
        self.positions = positions
        self.kept: list[int] = []
        self.reads: list[list[int]] = []
        self.passes = 0

    def scores(self, tokens: Sequence[int]) -> Tensor:
        """What follows each of some tokens from the beginning of the text on."""
        assert len(tokens) <= self.positions
        now = torch.tensor(tokens)
        return self.last[now] + self.before[torch.tensor([START, *tokens[:-1]])] + self.position[: len(tokens)]

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        self.passes += 1
        assert all(continuations)
        self.reads = [[*self.kept, *tokens] for tokens in continuations]
        return [self.scores(row)[len(self.kept) :] for row in self.reads]

    def keep(self, continuation: int, count: int) -> None:
        self.kept = self.reads[continuation][: len(self.kept) + count]

    def greedy(self, limit: int) -> list[int]:
        tokens = [START]
        while len(tokens) <= min(limit, self.positions):
            before = tokens[-2] if len(tokens) > 1 else START
            scores = self.last[tokens[-1]] + self.before[before] + self.position[len(tokens) - 1]
            scores[list(FORBIDDEN)] = -torch.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] == END:
                break
        return tokens[1:]


def certified(model: Toy, drafts: Sequence[Draft], limit: int, options: CertifyOptions | None = None) -> Certified:
    done = certify(model, drafts, WORDS, limit=limit, end=END, forbidden=FORBIDDEN, options=options)
    assert done.passes == model.passes
    assert len(done.probabilities) == len(done.ids)
    # Every pass but one that the end concludes writes one token of its own.
    assert done.passes in {done.written - done.accepted, done.written - done.accepted + 1}
    return done


class Spoiling(NamedTuple):
    """How a draft differs from a text. An edit is a position, a kind (0 instead, 1 before, 2 without) and a token."""

    kind: str
    edits: list[tuple[int, int, int]]
    sure: float | None
    size: int


SPOILINGS = st.builds(
    Spoiling,
    kind=st.sampled_from(["near", "near", "near", "wild", "cut", "repeated", "long", "empty", "special"]),
    edits=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(-2, VOCAB + 2)), max_size=6),
    sure=st.none() | st.floats(0, 1),
    size=st.integers(1, 4),
)


def spoilt(text: Sequence[int], spoiling: Spoiling) -> Draft:
    """Near the text, far from it, empty, too long, repeated, full of special tokens or of what is no token at all."""
    ids, wild = list(text), [token for *_, token in spoiling.edits]
    if spoiling.kind == "near":
        for position, kind, token in spoiling.edits:
            at = position % (len(ids) + 1)
            ids[at : at + (kind != 1)] = [token] * (kind != 2)
    elif spoiling.kind == "cut":
        ids = ids[len(spoiling.edits) :]
    ids = {
        "wild": wild,
        "repeated": ids * (2 + len(wild)),
        "long": [*ids, *wild, *[0] * 60],
        "empty": [],
        "special": [END, MASK, START, *ids, END, 10**9, -1, *wild],
    }.get(spoiling.kind, ids)
    return draft_of(ids, spoiling.sure, spoiling.size)


@settings(deadline=None, max_examples=250)
@given(
    seed=st.integers(0, 10**6),
    limit=st.integers(0, 45),
    positions=st.integers(1, 40),
    sharpness=st.sampled_from([0.0, 1.0, 3.0]),
    correct=st.booleans(),
    stop=st.sampled_from([1.0, 0.7, 0.1]),
    data=st.lists(SPOILINGS, max_size=3),
)
def test_the_text_is_the_greedy_one(
    seed: int,
    limit: int,
    positions: int,
    sharpness: float,
    correct: bool,
    stop: float,
    data: list[Spoiling],
) -> None:
    # Draws are what costs, so each is for five models and ten drafts of each.
    for model in range(seed, seed + 5):
        expected = Toy(model, positions, sharpness).greedy(limit)
        text = [token for token in expected if token != END]
        options = CertifyOptions(correct=correct, max_rejection_prob=stop)
        drafts = [spoilt(text, edits) for edits in data]
        done = certified(Toy(model, positions, sharpness), drafts, limit, options)
        assert done.ids == text
        assert done.written == len(expected)
        assert done.passes <= len(expected), "never less than one token at a time"


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), limit=st.integers(1, 40))
def test_a_right_draft_takes_one_pass(seed: int, limit: int) -> None:
    expected = Toy(seed).greedy(limit)
    text = [token for token in expected if token != END]
    done = certified(Toy(seed), [draft_of(text)], limit)
    assert (done.passes, done.ids) == (1, text)
    # Beside a useless one, the good draft is what counts.
    assert certified(Toy(seed), [draft_of([0] * 9), draft_of(text)], limit).passes == 1


def test_a_token_too_many_or_too_few_costs_a_pass_or_two() -> None:
    """The rest of the draft is found again by alignment, in a text whose tokens are all different."""

    class Counts(Toy):
        vocab_size = 50

        def scores(self, tokens: Sequence[int]) -> Tensor:
            now = [10 if last == START else END if last == 29 else min(last + 1, 49) for last in tokens]
            return torch.nn.functional.one_hot(torch.tensor(now), 50).double()

    text = list(range(10, 30))
    wrong = [*text[:5], 40, *text[6:]]
    more, fewer, both = [*text[:5], 40, *text[5:]], text[:5] + text[6:], [*text[:5], 40, 41, *text[7:]]
    for draft in (wrong, more, fewer, both, text[3:], text[:-4]):
        done = certified(Counts(0), [draft_of(draft)], 40)
        assert done.ids == text
        assert done.passes <= 5


def test_the_rest_of_a_replaced_word_is_left_out_and_several_errors_cost_one_pass() -> None:
    class Fixed(Toy):
        """Says the same at each position, whatever it has read."""

        vocab_size = 50
        text = (10, 11, 20, 12, 21, 13, END)

        def scores(self, tokens: Sequence[int]) -> Tensor:
            now = [self.text[min(i, len(self.text) - 1)] for i in range(len(tokens))]
            return torch.nn.functional.one_hot(torch.tensor(now), 50).double()

    draft = draft_of([10, 11, 30, 12, 31, 13])
    assert certified(Fixed(0), [draft], 40).passes == 2
    assert certified(Fixed(0), [draft], 40, CertifyOptions(correct=False)).passes == 3
    # 20 stands for 30 and 32: nothing of the old word is proposed after it.
    draft = Draft([word(10), word(11), word(30) + word(32), word(12), word(21), word(13)])
    assert certified(Fixed(0), [draft], 40).passes <= 3


def test_a_misspelled_word_costs_a_pass_and_not_the_words_after_it() -> None:
    """Right and wrong words have other tokens, so only their letters say where the text stands in the draft."""
    pieces = [" the", " town", " was", " named", " for", " name", " f", "or", " ge", "orge", " j", " to", "wn", ""]
    text, end = [0, 1, 2, 3, 4, 8, 9, 13], 13

    class Town(Toy):
        """Says the text after as many letters of it as it has read, whatever they were."""

        vocab_size, positions = len(pieces), 40

        def __init__(self) -> None:
            super().__init__(0)

        def scores(self, tokens: Sequence[int]) -> Tensor:
            now = [text[min(at, len(text) - 1)] for at in range(len(tokens))]
            return torch.nn.functional.one_hot(torch.tensor(now), len(pieces)).double()

    cuts = {" the": [0], " town": [1], " was": [2], " name": [5], " for": [4], " jorge": [10, 9], "orge": [9]}
    cuts |= {" twn": [11, 12], "wn": [12]}
    spelling = Spelling(piece=lambda token: pieces[token], tokens=lambda part: cuts.get(part, []))
    reader = Town()
    done = certify(reader, [Draft(["the", "twn", "was", "name", "for", "jorge"])], spelling, limit=40, end=end)
    assert done.ids == text[:-1]
    assert done.passes <= 4, "three words are wrong"


def test_an_unsure_draft_is_read_in_parts() -> None:
    text = [token for token in Toy(3).greedy(40) if token != END][:6]
    draft = draft_of(text, 0.5)
    lengths = []

    class Spy(Toy):
        def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
            lengths.append(len(continuations[0]))
            return super().read(continuations)

    certified(Spy(3), [draft], 6, CertifyOptions(max_rejection_prob=0.8))
    assert max(lengths) <= 1 + 2, "0.5 * 0.5 is the last product above 0.2"
    with pytest.raises(ValueError, match="max_rejection_prob"):
        CertifyOptions(max_rejection_prob=0.0)


def test_beams_are_refused() -> None:
    check_beams(1)
    with pytest.raises(ValueError, match=r"greedy text, so it has no beams, not 4"):
        check_beams(4)
    with pytest.raises(BudgetError, match="bert language model, which has no left-to-right reading"):
        check_causal(tiny_model("bert").backbone, "bert")


@pytest.fixture(scope="module")
def llama() -> DllmAsr:
    return tiny_model("llama").double()


@torch.no_grad()
def uncached(model: DllmAsr, memory: Tensor, limit: int) -> list[int]:
    """Greedy tokens of a Llama reading [memory, prompt, text], every step from the beginning."""
    vocab, lm = model.vocabulary, cast(PrefixBackbone, model.backbone).lm
    text: list[int] = []
    while len(text) < limit:
        tokens = torch.tensor([[vocab.start_id, *text]])
        inputs = torch.cat([memory, lm.get_input_embeddings()(tokens)], 1)
        scores = lm(inputs_embeds=inputs).logits[0, -1]
        scores[[vocab.mask_id, vocab.start_id, vocab.delete_id]] = -torch.inf
        text.append(int(scores.argmax()))
        if text[-1] == vocab.eos_id:
            return text[:-1]
    return text


@pytest.mark.parametrize("family", ["whisper", "llama"])
def test_real_decoders_write_what_they_write_step_by_step(request: pytest.FixtureRequest, family: str) -> None:
    model: DllmAsr = request.getfixturevalue(family)
    vocab = model.vocabulary
    forbidden = (vocab.mask_id, vocab.start_id, vocab.delete_id)
    generator = torch.Generator().manual_seed(0)
    states, lengths = (part.clone() for part in model.encode([speech(0.4 + 0.3 * i, i) for i in range(4)]))
    memory, mask = model.adapter(states, lengths)
    limits = [5, 20, 33, 12]
    if family == "whisper":
        expected = greedy(decoder_of(model), memory, mask, vocab, limits)
    else:
        rows = zip(memory, mask, limits, strict=True)
        expected = [uncached(model, row[real][None], limit) for row, real, limit in rows]
    for trial in range(6):
        for reader, text, limit in zip(causal_readers(model.backbone, memory, mask), expected, limits, strict=True):
            draft = list(text)
            for _ in range(trial):
                at = int(torch.randint(0, len(draft) + 1, (1,), generator=generator))
                draft[at : at + trial % 3] = torch.randint(0, vocab.size, (trial % 2,), generator=generator).tolist()
            # A word for each token, whatever the vocabulary writes.
            spelling = Spelling(lambda token: f" {word(token)}", WORDS.tokens)
            drafts = [draft_of(ids) for ids in (draft, [0, 1, 2])][: 1 + trial % 2]
            done = certify(reader, drafts, spelling, limit=limit, end=vocab.eos_id, forbidden=forbidden)
            assert done.ids == text
            assert trial or done.passes == 1


@pytest.mark.parametrize("family", ["whisper", "llama"])
def test_a_recording_that_is_done_leaves_the_batch_and_the_next_one_enters(
    request: pytest.FixtureRequest, family: str
) -> None:
    model: DllmAsr = request.getfixturevalue(family)
    vocab = model.vocabulary
    states, lengths = (part.clone() for part in model.encode([speech(0.3 + 0.25 * i, i) for i in range(7)]))
    memory, mask = model.adapter(states, lengths)
    limits = [6, 3, 9, 5, 0, 4, 7]
    spelling = Spelling(lambda token: f" {word(token)}", WORDS.tokens)

    def runs() -> list[Certification]:
        out = []
        for row, (reader, limit) in enumerate(zip(causal_readers(model.backbone, memory, mask), limits, strict=True)):
            # One, two or no draft for each; with two, a recording has two rows of a pass.
            drafts = [draft_of([row, 1, 2, 3 + row] * 3), draft_of([5, row])][: row % 3]
            forbidden = (vocab.mask_id, vocab.start_id, vocab.delete_id)
            out.append(Certification(reader, drafts, spelling, limit=limit, end=vocab.eos_id, forbidden=forbidden))
        return out

    alone = []
    with torch.no_grad():
        for run in runs():
            while not run.done:
                run.take(run.reader.read(run.continuations()))
            alone.append(run.result())
    read, sizes = BatchReader(), []

    def spy(readers: Sequence[CausalReader], continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[Tensor]]:
        sizes.append(len(readers))
        return read(readers, continuations)

    together = certify_together(runs(), spy, 3)
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids
        assert (one.passes, one.accepted, one.written) == (other.passes, other.accepted, other.written)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-9)
    assert max(sizes) == 3
    assert sum(sizes) == sum(one.passes for one in alone), "nobody is read after the end"
    assert sizes == sorted(sizes, reverse=True), "a row is free only where nobody waits for it"
    settings, limit = replace(model.config.decode, certify="ar"), DecodeBudget(max_new_tokens=6)
    texts = [
        [done.text for done in model.decode(states, lengths, limit, replace(settings, max_rows=rows))]
        for rows in (1, 3)
    ]
    assert texts[0] == texts[1]


def test_a_reader_stops_at_its_positions(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode([speech(0.5)])
    memory = whisper.adapter(states, lengths)
    (reader,) = causal_readers(whisper.backbone, *memory)
    assert reader.positions == whisper.config.backbone.max_position_embeddings
    forbidden = (*range(3, vocabulary().size),)  # never an end
    done = certify(reader, [draft_of([0] * 500)], WORDS, limit=10**6, end=vocabulary().eos_id, forbidden=forbidden)
    assert len(done.ids) == reader.positions
