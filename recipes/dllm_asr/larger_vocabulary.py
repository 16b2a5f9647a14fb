"""More tokens of Whisper's vocabulary for a trained model: `python larger_vocabulary.py MODEL OUT --size N ...`.

A word that the cut vocabulary lacks is spelled in pieces that Whisper's decoder has never written, so it is misspelled.
The larger vocabulary holds the tokens that the words of the given texts need most. Tokens that the model has keep the
rows it has learnt, new ones get Whisper's own, and all else stays; train on with `together.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tokenthrift.backbones.whisper_decoder import decoder_weights
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.vocabulary import SPECIAL, trim
from tokenthrift.sources import fetch


def written_words(speech: Path, sentences: Path | None) -> Counter[str]:
    """How often each word stands in training transcripts and in sentences, each as often as all of the other."""
    spoken, read = Counter[str](), Counter[str]()
    for shard in sorted(speech.glob("*.npz")):
        with np.load(shard) as data:
            for row in json.loads(str(data["rows"])):
                spoken.update(row["text"].split() if row["split"] == "train" else ())
    if sentences is not None:
        for line in sentences.read_text(encoding="utf-8").splitlines():
            read.update(re.findall("[a-z']+", json.loads(line)["text"].lower()))
    ratio = max(1, round(read.total() / max(1, spoken.total())))
    return read + Counter({word: ratio * times for word, times in spoken.items()})


def larger(model: DllmAsr, whisper: str, size: int, words: Counter[str]) -> DllmAsr:
    """The model with `size` tokens of Whisper's vocabulary instead of fewer.

    Args:
        model: with Whisper's decoder.
        whisper: transformers checkpoint, folder or Hub id.
        size: tokens, the special ones not counted.
        words: how often each is written.
    """
    folder = fetch(whisper, ("model.safetensors", "tokenizer.json"))
    vocabulary, keep = trim(folder / "tokenizer.json", size, words)
    state = load_file(folder / "model.safetensors")
    rows = decoder_weights(state, keep, len(SPECIAL), 1)["embed_tokens.weight"].float()
    own = decoder_of(model).embed_tokens.weight
    for token, i in vocabulary.tokenizer.get_vocab().items():
        if (old := model.vocabulary.tokenizer.token_to_id(token)) is not None:
            rows[i] = own[old]
    grown = DllmAsr(replace(model.config, vocab_size=vocabulary.size), vocabulary)
    grown.load_state_dict(grown.state_dict() | model.state_dict() | {"backbone.decoder.embed_tokens.weight": rows})
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=10_240, help="tokens (default: %(default)s)")
    parser.add_argument("--speech", type=Path, required=True, help="folder of speech shards, from recordings.py")
    parser.add_argument("--sentences", type=Path, help="sentences.jsonl, from sentences.py")
    parser.add_argument("--whisper", default="openai/whisper-tiny.en", help="folder or Hub id")
    arguments = parser.parse_args()
    model = DllmAsr.from_pretrained(arguments.model).float()
    words = written_words(arguments.speech, arguments.sentences)
    with torch.no_grad():
        grown = larger(model, arguments.whisper, arguments.size, words)
    cuts = [
        sum(len(v.word(word)) * times for word, times in words.items()) for v in (model.vocabulary, grown.vocabulary)
    ]
    before, now = (cut / words.total() for cut in cuts)
    print(f"tokens a word: {before:.3f} before, {now:.3f} now")
    grown.save_pretrained(arguments.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
