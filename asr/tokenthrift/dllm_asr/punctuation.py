"""Text as people read it: a small head says the casing of each word and the mark after it.

Not in dLLM-ASR (arXiv 2601.17902). The denoiser writes lower-case words. One more pass of the decoder over the finished
text, whatever wrote it, gives a state for every token; the head reads, for each word, the state before it (which
predicts how it begins), that of its last token (which predicts what follows), and that of its neighbors' ends, and says
casing and mark. Words and their order never change, so the error rate under a normaliser that drops both does not
either. The recipe `punctuation.py` trains it on what Whisper base wrote, where that agrees with the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.backbones.masked import MaskedDiffusionBackbone
from tokenthrift.backbones.whisper_decoder import WhisperDecoderBackbone
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.padding import pad_rows
from tokenthrift.transcript import Transcript

__all__ = ["CASES", "MARKS", "PunctuationHead", "labels_of", "punctuated", "word_states", "written"]

CASES: Final = ("lower", "capital", "upper")
MARKS: Final = ("", ",", ".", "?", "!")
IGNORED: Final = -100
_LEFT_AS_MARK: Final = {";": ",", ":": ",", "\u2014": ",", "-": ",", "\u2026": "."}


class PunctuationHead(nn.Module):
    """Words to casing and mark.

    Args:
        state_size: width of the decoder.
        hidden_size: width between the layers.
    """

    def __init__(self, state_size: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(state_size)
        self.word = nn.Linear(2 * state_size, hidden_size)
        self.context = nn.Conv1d(hidden_size, hidden_size, 3, padding=1)
        self.case, self.mark = nn.Linear(hidden_size, len(CASES)), nn.Linear(hidden_size, len(MARKS))

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of casing `(B, W, 3)` and mark `(B, W, 5)`.

        Args:
            states: `(B, W, 2, state_size)`, before each word and at its end; see `word_states`.
            mask: `(B, W)`, where a word exists.
        """
        x = F.gelu(self.word(self.norm(states.masked_fill(~mask[..., None, None], 0.0)).flatten(2)))
        x = x.masked_fill(~mask[..., None], 0.0)
        x = x + F.gelu(self.context(x.transpose(1, 2)).transpose(1, 2))
        return self.case(x), self.mark(x)


@torch.no_grad()
def word_states(
    backbone: MaskedDiffusionBackbone, vocabulary: Vocabulary, texts: Sequence[str], memory: Tensor, memory_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The decoder's states around every word, in one pass over finished texts.

    Args:
        backbone: the language model.
        vocabulary: words to tokens.
        texts: lower-case words, one for each row of the memory.
        memory: `(B, N, memory_size)`.
        memory_mask: `(B, N)`.

    Returns:
        `(B, W, 2, hidden_size)`, the state before each word and that of its last token, and `(B, W)` where a word is.
        Words beyond the positions of the model have no state and are left as they are.
    """
    model: Any = backbone
    device, ids, ends = memory.device, [], []
    whisper = isinstance(backbone, WhisperDecoderBackbone)
    positions = model.decoder.embed_positions.num_embeddings if whisper else model.lm.config.max_position_embeddings
    taken = len(model.start) if whisper else int(memory_mask.sum(1).max()) + len(model.header) + len(model.prompt)
    for text in texts:
        tokens: list[int] = []
        last = []
        for word in text.split():
            pieces = vocabulary.word(word)
            if taken + len(tokens) + len(pieces) > positions:
                break
            tokens += pieces
            last.append(len(tokens))
        ids.append(torch.tensor(tokens, dtype=torch.long))
        ends.append(torch.tensor(last, dtype=torch.long))
    batch, mask = (part.to(device) for part in pad_rows(ids, value=vocabulary.eos_id))
    index, words = (part.to(device) for part in pad_rows(ends))
    context = backbone.context(memory, memory_mask)
    if whisper:
        states = model.hidden(batch, mask, context)[:, len(model.start) - 1 :]
    else:
        states = F.pad(model.read(batch, mask, context)[0], (0, 0, 1, 0))
    before = F.pad(index, (1, 0))[:, :-1]
    picked = torch.stack([before, index], 2).flatten(1)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, picked).unflatten(1, (-1, 2)), words


def written(text: str, cases: Sequence[int], marks: Sequence[int]) -> str:
    """A text of lower-case words with the casing and the mark of each; words beyond the lists stay as they are."""
    out = text.split()
    for i, (case, mark) in enumerate(zip(cases, marks, strict=True)):
        cased = (out[i], _capital(out[i]), out[i].upper())[case]
        # A few letters become two in capitals; such a word stays as it is.
        out[i] = (cased if len(cased) == len(out[i]) else out[i]) + MARKS[mark]
    return " ".join(out)


def punctuated(
    head: PunctuationHead,
    backbone: MaskedDiffusionBackbone,
    vocabulary: Vocabulary,
    transcripts: Sequence[Transcript],
    memory: Tensor,
    memory_mask: Tensor,
) -> list[Transcript]:
    """Transcripts with casing and punctuation in text, tokens and words.

    Args:
        head: trained on this decoder.
        backbone: the decoder.
        vocabulary: words to tokens.
        transcripts: of lower-case words, one for each row of the memory.
        memory: `(B, N, memory_size)`.
        memory_mask: `(B, N)`.
    """
    some = [i for i, transcript in enumerate(transcripts) if transcript.text.strip()]
    out = list(transcripts)
    if not some:
        return out
    rows = torch.tensor(some, device=memory.device)
    texts = [transcripts[i].text for i in some]
    states, mask = word_states(backbone, vocabulary, texts, memory[rows], memory_mask[rows])
    with torch.no_grad():
        cases, marks = (scores.argmax(-1) for scores in head(states, mask))
    for row, i in enumerate(some):
        count = int(mask[row].sum())
        text = written(texts[row], cases[row, :count].tolist(), marks[row, :count].tolist())
        out[i] = _with_text(transcripts[i], text)
    return out


def labels_of(reference: str, cased: str) -> tuple[list[int], list[int]]:
    """Casing and mark of each reference word, by another writing of the same speech.

    Args:
        reference: lower-case words.
        cased: with capitals and punctuation, as Whisper writes.

    Returns:
        For each reference word its index in `CASES` and in `MARKS`; -100 where the other writing has another word.
    """
    from difflib import SequenceMatcher

    plain, written_words = reference.split(), cased.replace("\u2019", "'").split()
    keys = [_key(word) for word in written_words]
    cases, marks = [IGNORED] * len(plain), [IGNORED] * len(plain)
    for start, other, size in SequenceMatcher(None, plain, keys, autojunk=False).get_matching_blocks():
        for i in range(size):
            word = written_words[other + i]
            letters = re.sub(r"[^A-Za-z]", "", word)
            tail = re.search(r"[^\w']*$", word)
            mark = tail[0].strip("\"')]\u201d") if tail is not None else ""
            mark = _LEFT_AS_MARK.get(mark[:1], mark[:1])
            if not letters or mark not in MARKS:
                continue
            cases[start + i] = _case_of(letters, plain[start + i])
            marks[start + i] = MARKS.index(mark)
    return cases, marks


def _case_of(letters: str, plain: str) -> int:
    if len(letters) > 1 and letters.isupper():
        return 2
    return 1 if letters[0].isupper() and plain[:1].isalpha() else 0


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _key(word: str) -> str:
    return re.sub(r"[^a-z']", "", word.lower()).strip("'")


def _with_text(transcript: Transcript, text: str) -> Transcript:
    """A transcript with its words in another casing, and marks after them; pieces still join to the text."""
    plain, words = transcript.text.split(), text.split()
    pieces = [token.text for token in transcript.tokens]
    tokens = transcript.tokens
    if "".join(pieces).split() == plain:
        changed = _changed(pieces, plain, words)
        tokens = tuple(replace(token, text=piece) for token, piece in zip(tokens, changed, strict=True))
    spoken = transcript.words
    if len(spoken) == len(words):
        spoken = tuple(replace(word, text=new) for word, new in zip(spoken, words, strict=True))
    return replace(transcript, text=text, tokens=tokens, words=spoken)


def _changed(pieces: Sequence[str], plain: Sequence[str], words: Sequence[str]) -> list[str]:
    """Pieces of a text with other words, letter by letter; the mark of a word goes to the piece of its last letter."""
    out, word, letter = [], 0, 0
    for piece in pieces:
        new = ""
        for character in piece:
            if character.isspace():
                new += character
                continue
            new += words[word][letter]
            letter += 1
            if letter == len(plain[word]):
                new += words[word][letter:]
                word, letter = word + 1, 0
        out.append(new)
    return out
