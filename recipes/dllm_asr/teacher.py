"""What Whisper expects of each token of a text, for `frozen_encoder.py` and `together.py --teacher`.

Whisper reads every encoder state of the clean recording, its two start tokens before the text as it was trained, where
a model of ours has one and reads fewer states. Its expectations are soft targets (Hinton et al., 2015), which keep
training on some hours of speech from forgetting what Whisper knew. Of the end of a text nothing is learned from it: it
misses where a recording ends without silence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tokenthrift.backbones.whisper_decoder import WhisperDecoder, decoder_weights
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.sources import fetch
from tokenthrift.whisper import WhisperEncoder, encode_recordings, encoder_weights

START = ("<|startoftranscript|>", "<|notimestamps|>")
NEVER = -1e4  # the logarithm of a probability that counts for nothing, and is a number


class Teacher(nn.Module):
    """An English Whisper whose decoder knows the tokens of another vocabulary.

    Args:
        whisper: transformers checkpoint, folder or Hub id.
        vocabulary: a cut of Whisper's.
        positions: tokens of the longest text, start and end not counted.

    Raises:
        ValueError: the vocabulary has tokens that this Whisper lacks.
    """

    def __init__(self, whisper: str, vocabulary: Vocabulary, positions: int) -> None:
        super().__init__()
        source = fetch(whisper, ("config.json", "model.safetensors", "tokenizer.json"))
        sizes = json.loads((source / "config.json").read_text(encoding="utf-8"))
        state, tokenizer = load_file(source / "model.safetensors"), Tokenizer.from_file(str(source / "tokenizer.json"))
        words = vocabulary.source_ids(tokenizer)
        found = [*words, *map(tokenizer.token_to_id, ("<|endoftext|>", *START))]
        self.vocabulary, self.words = vocabulary, len(words)
        names = ["layers", "attention_heads", "ffn_dim"]
        inner, outer = ([sizes[f"{side}_{name}"] for name in names] for side in ("encoder", "decoder"))
        positions = min(positions + len(START), sizes["max_target_positions"])
        self.encoder = WhisperEncoder(sizes["d_model"], *inner, sizes["num_mel_bins"])
        self.encoder.load_state_dict(encoder_weights(state))
        self.decoder = WhisperDecoder(len(found), sizes["d_model"], *outer, positions)
        self.decoder.load_state_dict(decoder_weights(state, found, 0, positions))
        self.num_mel_bins: int = sizes["num_mel_bins"]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, recordings: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> Tensor:
        """Logarithms of the probabilities (tokens, V) of each token of texts, ends included, over the vocabulary.

        Args:
            recordings: (samples,) at 16 kHz each.
            texts: token ids.
        """
        return self.read(*encode_recordings(self.encoder, recordings, self.num_mel_bins), texts)

    @torch.no_grad()
    def read(self, states: Tensor, lengths: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """As `forward`, of encoder states (B, N, D) and their lengths (B,)."""
        context = self.decoder.context(states, length_mask(lengths))
        start = list(range(self.words + 1, self.words + 1 + len(START)))
        ids, _ = pad_rows([torch.tensor([*start, *text]) for text in texts])
        _, used = pad_rows([torch.zeros(len(text) + 1) for text in texts])
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        hidden = self.decoder(ids, causal, context)[0][:, len(START) - 1 :]
        scores = self.decoder.logits(hidden[used])[:, : self.words + 1].float().log_softmax(-1)
        out = scores.new_full((len(scores), self.vocabulary.size), NEVER)
        out[:, : self.words] = scores[:, :-1]
        out[:, self.vocabulary.eos_id] = scores[:, -1]
        return out


def divergence(scores: Tensor, targets: Tensor, expected: Tensor, end: int) -> Tensor:
    """The mean divergence of what is expected, (tokens, V), from scores (tokens, V), but for ends of texts.

    Args:
        scores: of each token.
        targets: (tokens,) that were said.
        expected: logarithms of probabilities.
        end: the token of an end.
    """
    words = targets != end
    found = scores[words].log_softmax(-1)
    return F.kl_div(found, expected[words], log_target=True, reduction="batchmean")
