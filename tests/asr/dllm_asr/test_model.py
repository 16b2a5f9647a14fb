"""dLLM-ASR as a model: the contract of all models over three families, and the laws of its transcripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_dllm import FFN, HEADS, LAYERS, WIDTH, Family, speech, tiny_config, tiny_model, vocabulary
from tests.model_contract import ModelContract, Outputs
from tokenthrift.budget import BudgetError, DecodeBudget, ItemSize, TokenBudget
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder
from tokenthrift.dllm_asr.config import BackboneConfig, DecodeConfig, DllmAsrConfig, EncoderConfig
from tokenthrift.dllm_asr.draft import CHARACTERS, DraftWord, character_ids, ctc_log_likelihood, ctc_loss
from tokenthrift.dllm_asr.training.config import ExampleConfig
from tokenthrift.dllm_asr.training.corruption import diffusion_loss
from tokenthrift.dllm_asr.training.examples import build_batch
from tokenthrift.hub import ConfigError, HubModel, WeightsError, read_config
from tokenthrift.transcript import Recognizer, Transcript
from tokenthrift.whisper import states_of

ROOT = Path(__file__).resolve().parents[3]
VERSION_1 = Path(__file__).parent / "version_1"
FAMILIES: tuple[Family, ...] = get_args(Family)
Item = tuple[Tensor, str]


class Contract(ModelContract):
    """Draft and denoiser over the same encoder, with both losses."""

    family: Family
    tolerance = 1e-4  # of logits that go up to 50

    def build(self) -> DllmAsr:
        return tiny_model(self.family)

    def items(self) -> list[Item]:
        return [(speech(0.7, 1), "the dog"), (speech(1.3, 2), "jumps over it"), (speech(0.3, 3), "a")]

    def canvas(self, items: list[Item]) -> tuple[Tensor, Tensor]:
        """Every second token of the text hidden, and two more slots."""
        vocab = vocabulary()
        rows = [[t for w in text.split() for t in vocab.word(w)] for _, text in items]
        rows = [[t if i % 2 else vocab.mask_id for i, t in enumerate(row)] + [vocab.mask_id] * 2 for row in rows]
        width = max(map(len, rows))
        mask = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
        return torch.tensor([r + [vocab.eos_id] * (width - len(r)) for r in rows]), mask

    def outputs(self, model: DllmAsr, items: list[Item]) -> Outputs:
        states, lengths = model.encode([samples for samples, _ in items])
        ids, mask = self.canvas(items)
        memory, memory_mask = model.adapter(states, lengths)
        logits = model.backbone(ids, mask, model.backbone.context(memory, memory_mask))[..., : vocabulary().mask_id]
        log_p = model.draft(states, lengths)
        return [[log_p[i, :n], logits[i][mask[i]]] for i, n in enumerate(lengths.tolist())]

    def shapes(self, model: DllmAsr, item: Item) -> list[tuple[int, ...]]:
        slots = self.canvas([item])[0].shape[1]
        return [(states_of(len(item[0])), len(CHARACTERS) + 1), (slots, vocabulary().mask_id)]

    def loss(self, model: DllmAsr, items: list[Item]) -> Tensor:
        states, lengths = (part.clone() for part in model.encode([samples for samples, _ in items]))
        texts, seconds = [text for _, text in items], (lengths / 50).tolist()
        drafts = [[DraftWord("dogs", 0.5, 0.1, 0.6)], [DraftWord("jumps", 0.5, 0.1, 0.6)], []][: len(items)]
        made = build_batch(
            texts,
            seconds,
            drafts,
            range(len(texts)),
            vocabulary(),
            ExampleConfig(partially_decoded_prob=0),
            max_slots=64,
        )
        context = model.backbone.context(*model.adapter(states, lengths))
        logits = model.backbone(
            made.corrupted.ids, made.mask, context, made.windows * 50 / model.adapter.rate, made.hints
        )
        return diffusion_loss(logits, made.targets, made.mask, made.corrupted) + ctc_loss(
            model.draft(states, lengths), lengths, [character_ids(t) for t in texts]
        )


class TestWhisper(Contract):
    family = "whisper"


class TestBert(Contract):
    family = "bert"


class TestLlama(Contract):
    family = "llama"


def alike(one: Transcript, other: Transcript) -> None:
    """Equal but for the last digits of confidences."""
    assert one.text == other.text
    assert one.usage == other.usage
    assert [(t.text, t.start, t.end) for t in one.tokens] == [(t.text, t.start, t.end) for t in other.tokens]
    assert [t.confidence for t in one.tokens] == pytest.approx([t.confidence for t in other.tokens], abs=1e-4)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> DllmAsr:
    # In double precision, as random weights can make much of the last digit of a float.
    return tiny_model(request.param).double()


@pytest.fixture(scope="module")
def whisper() -> DllmAsr:
    return tiny_model("whisper").double()


AUDIO = [speech(seconds, seed) for seed, seconds in enumerate([0.5, 0.2, 0.8, 0.02, 0.5, 0.3])]


@contextmanager
def decoding(model: DllmAsr, **changes: Any) -> Iterator[DllmAsr]:
    """The model with other decoding settings, for a while."""
    config = model.config
    model.config = replace(config, decode=replace(config.decode, **changes))
    try:
        yield model
    finally:
        model.config = config


@pytest.mark.parametrize(
    "settings",
    [
        {"draft": "confident"},
        {"draft": "length"},
        {"draft": "none"},
        {"draft": "both"},
        {"draft": "both", "verify_committed": True, "verify_threshold": 0.3},
    ],
)
def test_transcripts_of_a_batch_are_those_of_each_alone(model: DllmAsr, settings: dict[str, Any]) -> None:
    with decoding(model, draft_threshold=0.5, **settings):
        together = model.transcribe(AUDIO)
        assert len({t.text for t in together}) > 2, "equal texts would prove little"
        for samples, transcript in zip(AUDIO, together, strict=True):
            alike(model.transcribe([samples])[0], transcript)


def test_the_encoder_hears_silence_after_each_recording_and_keeps_none_of_it(model: DllmAsr) -> None:
    plain = model.config
    model.config = replace(plain, encoder=replace(plain.encoder, trailing_silence=0.3))
    try:
        together, lengths = model.encode(AUDIO)
    finally:
        model.config = plain
    assert lengths.tolist() == [states_of(len(a)) for a in AUDIO]
    for row, (samples, n) in enumerate(zip(AUDIO, lengths.tolist(), strict=True)):
        (alone,), _ = model.encode([torch.cat([samples, torch.zeros(4800)])])
        torch.testing.assert_close(together[row, :n], alone[:n], rtol=0, atol=1e-5)
        assert not together[row, n:].any()
    assert (together[0, : lengths[0]] - model.encode(AUDIO[:1])[0][0]).abs().max() > 1e-3


def test_silence_counts_in_the_size_of_a_batch(model: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.dllm_asr.model.BATCH_STATES", 60)
    monkeypatch.setattr(
        model, "config", replace(model.config, encoder=replace(model.config.encoder, trailing_silence=0.3))
    )
    forward: Callable[..., Tensor] = model.encoder.forward
    sizes = list[int]()

    def spied(mels: Tensor, lengths: Tensor) -> Tensor:
        sizes.append(mels.shape[0] * (mels.shape[2] // 2))
        return forward(mels, lengths)

    monkeypatch.setattr(model.encoder, "forward", spied)
    model.transcribe([speech(0.1, seed) for seed in range(9)])
    assert len(sizes) > 1
    assert max(sizes) <= 60


@given(st.permutations(range(len(AUDIO))), st.integers(1, len(AUDIO)))
@settings(deadline=None, max_examples=5)
def test_neither_order_nor_company_matters(whisper: DllmAsr, order: list[int], count: int) -> None:
    whole = whisper.transcribe(AUDIO)
    for i, transcript in zip(order[:count], whisper.transcribe([AUDIO[i] for i in order[:count]]), strict=True):
        alike(transcript, whole[i])


def test_batches_too_large_for_one_pass_are_split(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, each as large as fits; a recording that does not fit goes alone."""
    whole = whisper.transcribe(AUDIO)
    states = [states_of(len(samples)) for samples in AUDIO]
    assert sorted(states) == [1, 10, 15, 25, 25, 40]
    encode: Callable[..., tuple[Tensor, Tensor]] = whisper.encode
    batches = list[list[int]]()

    def spied(audio: list[Tensor]) -> tuple[Tensor, Tensor]:
        batches.append([states_of(len(samples)) for samples in audio])
        return encode(audio)

    monkeypatch.setattr(whisper, "encode", spied)
    for most, expected in (
        (120, [[40, 25, 25], [15, 10, 1]]),
        (60, [[40], [25, 25], [15, 10, 1]]),
        (1, [[40], [25], [25], [15], [10], [1]]),
    ):
        batches.clear()
        monkeypatch.setattr("tokenthrift.dllm_asr.model.BATCH_STATES", most)
        for one, other in zip(whisper.transcribe(AUDIO), whole, strict=True):
            alike(one, other)
        assert batches == expected


def test_padding_is_not_read(model: DllmAsr) -> None:
    states, lengths = (part.clone() for part in model.encode(AUDIO))
    expected = model.decode(states, lengths)
    padding = torch.arange(states.shape[1]) >= lengths[:, None]
    for transcript, other in zip(
        expected, model.decode(states.masked_fill(padding[..., None], torch.nan), lengths), strict=True
    ):
        alike(transcript, other)


def test_transcripts_hold_together(model: DllmAsr) -> None:
    for samples, transcript in zip(AUDIO, model.transcribe(AUDIO), strict=True):
        assert "".join(t.text for t in transcript.tokens).strip() == transcript.text
        assert transcript.text == " ".join(transcript.text.split())
        assert all(0 <= t.confidence <= 1 and t.text for t in transcript.tokens)
        times = [time for t in transcript.tokens for time in (t.start, t.end) if time is not None]
        assert len(times) == 2 * len(transcript.tokens)
        assert all(b >= a - 1e-9 for a, b in zip(times, times[1:], strict=False))
        assert not times or (times[0] >= 0 and times[-1] <= states_of(len(samples)) * 0.02 + 1e-9)


def test_usage_is_what_was_planned(model: DllmAsr) -> None:
    sizes = [len(samples) for samples in AUDIO]
    usage = [t.usage for t in model.transcribe(AUDIO)]
    planned = model.plan([ItemSize(seconds=n / 16_000) for n in sizes])
    assert [u.used for u in usage] == [u.cap for u in usage] == [p.used for p in planned]
    assert [u.native for u in usage] == [p.native for p in planned] == [states_of(n) for n in sizes]


def test_rounds_are_limited(model: DllmAsr) -> None:
    free = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0))
    assert max(t.usage.rounds for t in free) > 2
    for most in (1, 2):
        limited = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0, max_rounds=most))
        assert [t.usage.rounds for t in limited] == [min(most, t.usage.rounds) for t in free]
        with decoding(model, confidence_threshold=1.0, max_rounds=most) as own:
            for one, other in zip(own.transcribe(AUDIO), limited, strict=True):
                alike(one, other)
            more = own.transcribe(AUDIO, decode=DecodeBudget(max_rounds=99))
            assert [t.usage.rounds for t in more] == [t.usage.rounds for t in free]


def test_new_tokens_are_limited(model: DllmAsr) -> None:
    free = model.transcribe(AUDIO)
    assert max(len(t.tokens) for t in free) > 3
    for most in (1, 3):
        limited = model.transcribe(AUDIO, decode=DecodeBudget(max_new_tokens=most))
        assert max(len(t.tokens) for t in limited) <= most


def test_the_threshold_is_kept(model: DllmAsr) -> None:
    bold = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1e-6))
    assert {t.usage.rounds for t in bold} <= {0, 1}
    careful = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0))
    assert sum(t.usage.rounds for t in careful) > sum(t.usage.rounds for t in bold)
    with decoding(model, confidence_threshold=1e-6):
        for limits in (None, DecodeBudget(), {"max_rounds": 9}):  # limits without one leave it to the model
            for one, other in zip(model.transcribe(AUDIO, decode=limits), bold, strict=True):
                alike(one, other)


def test_a_draft_without_doubts_is_the_transcript(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode(AUDIO)
    trusting = DecodeConfig(draft_threshold=0.0, verify_threshold=0.0, extra_slots_at_end=0)
    drafts = whisper.drafts(states, lengths)
    for words, transcript in zip(drafts, whisper.decode(states, lengths, settings=trusting), strict=True):
        assert transcript.text == " ".join(w.text for w in words)
        assert transcript.usage.rounds == 0
        assert {t.confidence for t in transcript.tokens} == {w.confidence for w in words}


def test_of_two_responses_the_one_that_the_draft_head_likes_better_stays(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode(AUDIO)
    log_p = whisper.draft(states, lengths).detach()
    one, two, both = (
        whisper.decode(states, lengths, settings=DecodeConfig(draft=draft, draft_threshold=0.01, verify_threshold=0.0))
        for draft in ("confident", "length", "both")
    )
    assert any(a.text != b.text for a, b in zip(one, two, strict=True))
    for i, (a, b, c) in enumerate(zip(one, two, both, strict=True)):
        score = [ctc_log_likelihood(log_p[i, : lengths[i]], t.text) for t in (a, b)]
        best = b if score[1] > score[0] else a
        assert c.text == best.text
        assert [t.start for t in c.tokens] == [t.start for t in best.tokens]
        assert c.usage.rounds == max(a.usage.rounds, b.usage.rounds)


@pytest.mark.parametrize("draft", ["confident", "length", "both", "none"])
def test_words_of_the_draft_cannot_end_the_text(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch, draft: Any) -> None:
    """A denoiser that wants nothing but the end gets it in spare slots only: all of them where there is no draft."""
    forward: Callable[..., Tensor] = whisper.backbone.forward

    def eager(*arguments: Any) -> Tensor:
        logits = forward(*arguments)
        logits[..., vocabulary().eos_id] += 1e3
        return logits

    monkeypatch.setattr(whisper.backbone, "forward", eager)
    states, lengths = whisper.encode(AUDIO)
    transcripts = whisper.decode(states, lengths, settings=DecodeConfig(draft=draft, verify_threshold=0.5))
    assert [bool(t.text) for t in transcripts] == [
        draft != "none" and bool(words) for words in whisper.drafts(states, lengths)
    ]


def test_fast_speech_gives_up_spare_slots_before_words(whisper: DllmAsr) -> None:
    words = [DraftWord("dog", 0.1, i / 8, (i + 1) / 8) for i in range(90)]
    piece, room = len(whisper.vocabulary.word("dog")), whisper.max_slots(500)
    enough = (room - whisper.config.decode.extra_slots_at_end) // piece
    assert enough * (piece + 1) > room, "with one spare slot each they would not fit"
    (canvas,) = whisper.canvases([words[:enough]], torch.tensor([500]), whisper.config.decode)
    assert canvas.hints[: enough * piece] == list(whisper.vocabulary.word("dog")) * enough
    few = whisper.canvases([words[:2]], torch.tensor([500]), whisper.config.decode)[0]
    assert len(few.ids) > 2 * piece + whisper.config.decode.extra_slots_at_end


def test_no_word_in_the_draft_is_silence(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.dllm_asr.model.draft_words", lambda log_p: [])
    (transcript,) = whisper.transcribe([torch.zeros(8000)])
    assert (transcript.text, transcript.tokens, transcript.usage.rounds) == ("", (), 0)
    assert transcript.usage.native == 25


def test_only_spare_slots_end_a_text(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that would end the text at once still writes something for each word of the draft."""
    vocab = whisper.vocabulary
    words = [DraftWord("dog", 0.1, 0.1, 0.2), DraftWord("fox", 0.1, 0.3, 0.4)]
    (token,) = set(vocab.word("a"))
    logits = torch.zeros(vocab.size)
    logits[token], logits[vocab.eos_id] = 20.0, 40.0
    monkeypatch.setattr("tokenthrift.dllm_asr.model.draft_words", lambda log_p: words)
    monkeypatch.setattr(whisper.backbone, "forward", lambda ids, *_: logits.repeat(*ids.shape, 1))
    states, lengths = whisper.encode([speech(1.0, 1)])
    (canvas,) = whisper.canvases([words], lengths, whisper.config.decode)
    (done,) = whisper.decode(states, lengths)
    assert len(done.tokens) == len(canvas.ids) - whisper.config.decode.extra_slots_at_end
    (free,) = whisper.decode(states, lengths, settings=replace(whisper.config.decode, draft="none"))
    assert not free.tokens


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 321])
def test_recordings_may_be_as_short_as_they_like(model: DllmAsr, samples: int) -> None:
    (transcript,) = model.transcribe([speech(0.1)[:samples]])
    assert transcript.usage.native == states_of(samples)
    assert transcript.usage.used == model.plan([transcript.usage.native])[0].used == 1


def test_no_recordings_no_transcripts(whisper: DllmAsr) -> None:
    assert whisper.transcribe([]) == []


def test_thirty_seconds_are_the_longest(whisper: DllmAsr) -> None:
    (transcript,) = whisper.transcribe([torch.zeros(30 * 16_000)])
    assert transcript.usage.native == 1500
    assert whisper.max_seconds == 30


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1600,), torch.nan), "audio 1 holds NaN or infinite samples"),
        (torch.full((1600,), torch.inf), "audio 1 holds NaN or infinite samples"),
        (torch.zeros(30 * 16_000 + 1), r"audio 1 has 30\.00 s, at most 30 s"),
        (torch.zeros(2, 1600), r"audio 1 must be one channel of shape \(samples,\), got \(2, 1600\)"),
        (torch.tensor(0.0), r"audio 1 must be one channel of shape \(samples,\), got \(\)"),
    ],
)
def test_bad_recordings_are_named(whisper: DllmAsr, bad: Tensor, message: str) -> None:
    for call in (whisper.transcribe, whisper.encode):
        with pytest.raises(ValueError, match=message):
            call([speech(0.2), bad, speech(3.0)])


def test_recordings_that_fill_a_prefix_model_are_refused() -> None:
    model = tiny_model("bert")
    most = (model.config.backbone.max_position_embeddings - 2) * 4
    assert model.max_slots(most) == 1
    with pytest.raises(ValueError, match="leave no room for text in a model of 128 positions"):
        model.max_slots(most + 1)
    # Whatever the draft says, memory and response fit together.
    for transcript in model.transcribe([speech(9.0), speech(0.3)]):
        assert transcript.usage.used + len(transcript.tokens) < model.config.backbone.max_position_embeddings


def test_it_is_a_recognizer(whisper: DllmAsr) -> None:
    assert isinstance(whisper, Recognizer)
    assert whisper.sample_rate == 16_000


def test_the_vocabulary_travels_with_the_model(whisper: DllmAsr, tmp_path: Path) -> None:
    whisper.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = DllmAsr.from_pretrained(tmp_path)
    assert loaded.vocabulary.tokenizer.get_vocab() == whisper.vocabulary.tokenizer.get_vocab()
    own = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in tmp_path.iterdir()} == own | {"preprocessor_config.json", "tokenizer_config.json"}
    config = replace(whisper.config, draft=replace(whisper.config.draft, num_hidden_layers=2))
    DllmAsr(config, vocabulary()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"draft\.layers\.1"):
        DllmAsr.from_pretrained(tmp_path / "other")


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 124 tokens, the configuration says 124\d"):
        DllmAsr(replace(tiny_config("whisper"), vocab_size=1240), vocabulary())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: EncoderConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
        (lambda: BackboneConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
        (lambda: BackboneConfig(max_position_embeddings=8), "max_position_embeddings must be between 16"),
        (lambda: DecodeConfig(confidence_threshold=0.0), "confidence_threshold must be between"),
        (lambda: DecodeConfig(extra_slots_ratio=-0.1), "extra_slots_ratio must be between"),
        (lambda: DllmAsrConfig(vocab_size=4), "vocab_size must be between"),
        (
            lambda: replace(tiny_config("whisper"), encoder=EncoderConfig()),
            "backbone.hidden_size 32 must equal encoder.hidden_size",
        ),
    ],
)
def test_configurations_out_of_range_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_sizes_are_those_of_the_configuration(whisper: DllmAsr) -> None:
    assert whisper.encoder.conv1.weight.shape == (WIDTH, 80, 3)
    assert len(whisper.encoder.layers) == LAYERS
    first: Any = whisper.encoder.layers[0]
    assert (first.fc1.out_features, first.self_attn.heads) == (FFN, HEADS)
    assert not any(p.requires_grad for p in whisper.encoder.parameters())


@pytest.mark.parametrize("kind", [DllmAsr, AutoregressiveDecoder])
def test_folders_of_the_first_format_still_load(kind: type[HubModel], tmp_path: Path) -> None:
    """The configurations that release 0.1.0 shipped, under today's names."""
    fields = json.loads((VERSION_1 / f"{kind.system}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path, kind)
    assert config.encoder == EncoderConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6)
    assert config.draft.hidden_size == 256
    assert config.backbone.max_position_embeddings == 256
    old = fields["decode"]
    assert config.decode.extra_slots_ratio == old["slack"]
    assert config.decode.extra_slots_at_end == old["margin"]
    assert config.decode.verify_threshold == old["verify"]
    assert config.decode.verify_committed == old.get("recheck", False)
    assert config.decode.slots_per_second == old["tokens_per_second"]
    fields["backbone"]["hight"] = 3
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="unknown field 'hight'"):
        read_config(tmp_path, kind)


def test_shipped_folders_are_of_todays_format_and_mean_what_they_meant(tmp_path: Path) -> None:
    for folder in ("model_cards/dllm-asr-tiny-en", "benchmarks/dllm-asr-autoregressive"):
        assert json.loads((ROOT / folder / "config.json").read_text())["format_version"] == 2
    (tmp_path / "config.json").write_text((VERSION_1 / f"{AutoregressiveDecoder.system}.json").read_text())
    baseline = read_config(ROOT / "benchmarks/dllm-asr-autoregressive", AutoregressiveDecoder)
    assert baseline == read_config(tmp_path, AutoregressiveDecoder)


def test_plans_are_exact_up_to_30_seconds_and_count_windows_beyond(model: DllmAsr) -> None:
    (one,) = model.plan([ItemSize(seconds=30.0)])
    three, none = model.plan([ItemSize(seconds=61.0), ItemSize(seconds=0.0)])
    assert one.native == 1500
    assert three.native == 61 * 50
    (rest,) = model.plan([ItemSize(seconds=1.0)])
    assert three.used == 2 * one.used + rest.used
    assert none.used == 1
    assert model.plan([1500]) == (one,)
    assert model.native_cost.per_second == 50
    with pytest.raises(BudgetError, match="seconds is known"):
        model.plan([ItemSize(frames=3)])


@pytest.mark.parametrize("budget", [64, "25%", "12.5/s", "e0.1", {"max_tokens": 5}, TokenBudget(retention=0.5)])
def test_ceilings_are_not_honored_and_say_so(whisper: DllmAsr, budget: Any) -> None:
    for call in (partial(whisper.plan, [ItemSize(seconds=1.0)]), partial(whisper.transcribe, [speech(0.3)])):
        with pytest.raises(BudgetError, match="no ceiling"):
            call(budget)
        with pytest.raises(BudgetError, match="no ceiling"):
            call([budget])


def test_a_floor_is_honored_for_each_recording(whisper: DllmAsr) -> None:
    sizes = [ItemSize(seconds=1.0), ItemSize(seconds=0.2)]
    assert [u.used for u in whisper.plan(sizes, [{"min_tokens": 25}, None])] == [25, 5]
    with pytest.raises(BudgetError, match="leaves 25 of 50 tokens"):
        whisper.plan(sizes, [{"min_tokens": 26}, None])
    with pytest.raises(ValueError, match="2 items but 1 budgets"):
        whisper.plan(sizes, [None])


def test_a_decode_budget_is_not_a_budget_of_tokens(whisper: DllmAsr) -> None:
    with pytest.raises(BudgetError, match="give it as decode="):
        whisper.transcribe([speech(0.3)], DecodeBudget(max_rounds=2))
    with pytest.raises(BudgetError, match="'max_round'"):
        whisper.transcribe([speech(0.3)], decode={"max_round": 2})


def test_a_constructed_model_is_in_evaluation_mode() -> None:
    """Dropout of a language model of transformers would otherwise change every transcript."""
    for family in FAMILIES:
        model = DllmAsr(tiny_config(family), vocabulary())
        assert not any(part.training for part in model.modules())
    assert not AutoregressiveDecoder(tiny_config("whisper"), vocabulary()).training
