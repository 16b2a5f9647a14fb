"""A draft by another model: words, confidences and times of any recognizer with times start the denoiser.

A strong CTC model (wav2vec 2.0, Parakeet) and a large denoiser meet so without training a head: `model.draft_model =
load_transformers("facebook/wav2vec2-base-960h")`. dLLM-ASR (arXiv 2601.17902, section III-F) trains its own CTC branch.
Words are brought to the characters of our drafts, which are those the denoiser was trained on.
"""

from __future__ import annotations

from tokenthrift.dllm_asr.draft import CHARACTERS, DraftWord
from tokenthrift.transcript import Transcript
from tokenthrift.words import words_of_tokens

__all__ = ["draft_of"]


def draft_of(transcript: Transcript) -> list[DraftWord]:
    """The words of a transcript as a draft; a word of none of our characters is left out.

    Raises:
        ValueError: there is text, and its words have no times.
    """
    words = transcript.words or words_of_tokens(transcript.tokens)
    if transcript.text and not words:
        raise ValueError("a draft needs the times of its words, and this model gives none; a CTC model does")
    drafts = []
    for word in words:
        text = "".join(c for c in word.text.lower() if c in CHARACTERS)
        if text:
            drafts.append(DraftWord(text, word.confidence, word.start, word.end))
    return drafts
