"""Words that a recording is likely to hold: their tokens gain in the slots that are still open.

Source: shallow fusion with a list of phrases, as Whisper's clients know it (faster-whisper's `hotwords` are a prompt;
here there is no prompt to put them in). What differs: only open slots gain, so what the draft and the audio are sure of
stays, a token inside a hotword gains only after the one before it, and a token that several hotwords share gains once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.dllm_asr.vocabulary import Vocabulary

__all__ = ["Hotwords"]


class Hotwords:
    """Adds a bonus to the logits of words.

    Args:
        words: words or phrases; letters and apostrophes.
        vocabulary: gives their tokens.
        boost: nats.

    Raises:
        ValueError: a word has characters that the vocabulary does not, or none.
    """

    def __init__(self, words: Sequence[str], vocabulary: Vocabulary, boost: float) -> None:
        self.boost, self.mask_id = boost, vocabulary.mask_id
        self.tokens: list[tuple[int, ...]] = []
        for phrase in words:
            parts = phrase.lower().split()
            tokens = tuple(token for part in parts for token in vocabulary.word(part))
            if not tokens or vocabulary.text(tokens) != " ".join(parts):
                raise ValueError(f"hotword {phrase!r} cannot be written in letters and apostrophes")
            self.tokens.append(tokens)

    def boosted(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits (R, W, vocab) of slots that hold `ids` (R, W), with the bonus; the input stays as it was."""
        open_slots = ids == self.mask_id
        out = logits.clone()
        gained: dict[int, Tensor] = {}
        for tokens in self.tokens:
            # Where the hotword has come so far: at first everywhere, then where the slot holds or would hold its token.
            reached = torch.ones_like(open_slots)
            for token in tokens:
                before = gained.get(token, torch.zeros_like(open_slots))
                gained[token] = before | (reached & open_slots)
                out[..., token] += self.boost * (gained[token] & ~before)
                said = torch.where(open_slots, out.argmax(-1), ids)
                here = reached & (said == token)
                reached = torch.zeros_like(here)
                reached[:, 1:] = here[:, :-1]
        return out
