"""Certified text is that of the model: other drafts, samplers and limits do not change it, or are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_dllm import speech, tiny_model, vocabulary
from tokenthrift.backbones.samplers import LladaSampler
from tokenthrift.budget import BudgetError, DecodeBudget
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.config import DecodeConfig
from tokenthrift.dllm_asr.decoding import settings_for
from tokenthrift.dllm_asr.draft import DraftWord, length_guard

CARD = Path(__file__).parents[3] / "model_cards" / "dllm-asr-tiny-en"


@pytest.fixture(scope="module")
def random_models() -> list[tuple[DllmAsr, tuple[Tensor, Tensor], list[str]]]:
    """Models, recordings, and what each writes from left to right under the guard of its own draft."""
    found = []
    for seed in range(6):
        model = tiny_model("whisper", seed).double()
        states, lengths = (part.clone() for part in model.encode([speech(0.2 + 0.2 * i, seed + i) for i in range(3)]))
        limits = [length_guard(words, model.vocabulary) for words in model.drafts(states, lengths)]
        memory, mask = model.adapter(states, lengths)
        texts = greedy(decoder_of(model), memory, mask, model.vocabulary, limits)
        assert any(len(ids) == limit > 0 for ids, limit in zip(texts, limits, strict=True)), "the guard stops some"
        found.append((model, (states, lengths), [model.vocabulary.text(ids) for ids in texts]))
    return found


WORDS_OF_OTHERS = st.lists(
    st.builds(DraftWord, st.text("abcdefgt' ", max_size=9), st.floats(0, 1), st.just(0.0), st.just(0.1)), max_size=12
)


@settings(deadline=None, max_examples=25)
@given(
    chosen=st.integers(0, 5),
    drafts=st.lists(WORDS_OF_OTHERS, min_size=3, max_size=3),
    times=st.sampled_from([1, 1, 1, 9]),
    rows=st.sampled_from([1, 16]),
)
def test_drafts_of_other_models_change_nothing_in_the_certified_text(
    random_models: list[tuple[DllmAsr, tuple[Tensor, Tensor], list[str]]],
    chosen: int,
    drafts: list[list[DraftWord]],
    times: int,
    rows: int,
) -> None:
    """The guard too is that of the model's own draft, also where the other one is empty or far too long."""
    model, encoded, texts = random_models[chosen]
    way, drafts = replace(model.config.decode, certify="ar", max_rows=rows), [words * times for words in drafts]
    assert [done.text for done in model.decode(*encoded, settings=way, drafts=drafts)] == texts


def test_without_a_word_in_the_draft_nothing_is_written(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal decoder writes words of noise, too; the rule is one of both of its readings."""
    assert length_guard([], vocabulary()) == 0
    states, lengths = (part.clone() for part in whisper.encode([speech(0.5), speech(0.8, 1)]))
    memory, mask = whisper.adapter(states, lengths)
    assert greedy(decoder_of(whisper), memory, mask, vocabulary(), [0, 8])[0] == []
    monkeypatch.setattr("tokenthrift.dllm_asr.model.draft_words", lambda log_p: [])
    drafts = [[DraftWord("fox", 0.9, 0.1, 0.2)]] * 2
    for way in (replace(whisper.config.decode, certify="ar", certify_draft=kind) for kind in ("ctc", "both")):
        for other in (None, drafts):
            for done in whisper.decode(states, lengths, settings=way, drafts=other):
                assert (done.text, done.tokens, done.words, done.usage.written) == ("", (), (), 0)


def test_the_shipped_model_writes_nothing_of_white_noise() -> None:
    noise = 0.1 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    (done,) = DllmAsr.from_pretrained(CARD).transcribe([noise])
    assert (done.text, done.tokens, done.usage.rounds) == ("", (), 0)


def test_limits_of_the_denoiser_are_honored_or_refused() -> None:
    own, limits = DecodeConfig(certify="ar"), ({"max_rounds": 1}, {"confidence_threshold": 0.5}, {"hotwords": ["fox"]})
    for decode in limits:
        assert settings_for(DecodeBudget.parse(decode), own).certify is None
        assert settings_for(DecodeBudget.parse(decode), replace(own, certify_draft="both")).certify == "ar"
        with pytest.raises(BudgetError, match="limits of the denoiser where it runs"):
            settings_for(DecodeBudget.parse({**decode, "certify": "ar"}), own)
    assert settings_for(DecodeBudget.parse({"max_new_tokens": 4, "certify": "ar"}), own) is own


def test_a_sampler_or_several_texts_are_honored_or_refused(whisper: DllmAsr) -> None:
    """Beside the certified draft of the CTC head nothing is denoised, so that neither could be."""
    own, free = DecodeConfig(certify="ar"), DecodeBudget()
    assert settings_for(free, own, LladaSampler(steps=3)).certify is None
    assert settings_for(free, replace(own, certify_draft="both"), LladaSampler(steps=3)).certify == "ar"
    with pytest.raises(BudgetError, match="sampler with certify='ar'"):
        settings_for(DecodeBudget(certify="ar"), own, LladaSampler(steps=3))
    several = replace(own, n_best=4)
    for limits, way in ((free, several), (DecodeBudget(certify="ar"), replace(several, certify=None))):
        with pytest.raises(BudgetError, match="n_best=4 with the certified draft of the CTC head"):
            whisper.decode(*whisper.encode([speech(0.5)]), limits, way)
    for way in (replace(several, certify=None), replace(several, certify_draft="denoised")):
        assert settings_for(free, way) is way
    assert settings_for(DecodeBudget(max_rounds=1), several).n_best == 4
    states, lengths = (part.clone() for part in whisper.encode([speech(1.0), speech(1.5, 1)]))
    done = whisper.decode(states, lengths, settings=replace(several, certify_draft="both"))
    assert any(transcript.alternatives for transcript in done)
