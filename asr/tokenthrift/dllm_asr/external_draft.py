"""A draft by another model: words, confidences and times of any recognizer with times start the denoiser.

A strong CTC model (wav2vec 2.0, Parakeet) and a large denoiser meet so without training a head: `model.draft_model =
load_transformers("facebook/wav2vec2-base-960h")`. dLLM-ASR (arXiv 2601.17902, section III-F) trains its own CTC branch.
Words are brought to the characters of our drafts, which are those the denoiser was trained on: a hyphen parts words, a
typographic apostrophe is a plain one.
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
        written = word.text.lower().replace("\u2019", "'").replace("-", " ").split()
        parts = [part for part in ("".join(c for c in own if c in CHARACTERS) for own in written) if part]
        for i, part in enumerate(parts):
            start, end = (word.start + share * (word.end - word.start) / len(parts) for share in (i, i + 1))
            drafts.append(DraftWord(part, word.confidence, start, end))
    return drafts
