"""Eight bits in dLLM-ASR: encoder and draft have them, the language model and with it the certified text have not."""

from __future__ import annotations

from torch import nn

from tests.asr.tiny_dllm import speech, tiny_model
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.draft import length_guard
from tokenthrift.recognizers.precision import OneByOne, with_precision


def test_int8_leaves_the_language_model_and_so_the_certified_text_as_they_are() -> None:
    model = tiny_model("whisper", certify="ar")
    small = with_precision(model, model, "int8")
    assert isinstance(small, OneByOne)
    for part, whole in ((model.encoder, False), (model.draft, False), (model.backbone, True)):
        assert any(isinstance(module, nn.Linear) for module in part.modules()) == whole
    audio = [speech(0.6 + 0.3 * i, i) for i in range(2)]
    for samples, done in zip(audio, small.transcribe(audio), strict=True):
        states, lengths = model.encode([samples])
        limit = length_guard(model.drafts(states, lengths)[0], model.vocabulary)
        memory, mask = model.adapter(states, lengths)
        (ids,) = greedy(decoder_of(model), memory, mask, model.vocabulary, [limit])
        assert done.text == model.vocabulary.text(ids)
