"""More tokens of Whisper's vocabulary for a trained model: `python larger_vocabulary.py MODEL OUT --size N ...`.

A word that the cut vocabulary lacks is spelled in pieces that Whisper's decoder has never written, so it is misspelled.
The larger vocabulary holds the tokens that the words of the given texts need most. Tokens that the model has keep the
rows it has learnt, new ones get Whisper's own, and all else stays; train on with `together.py`.

`--whisper-share 0.5` takes the mean of what the model has learnt and what Whisper knew, in encoder and decoder (weights
of a model and of what it was fine-tuned from, as in WiSE-FT, Wortsman et al., 2022): training on little speech forgets.
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

from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.pretrained import assemble

EMBEDDING = "backbone.decoder.embed_tokens.weight"


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


@torch.no_grad()
def larger(model: DllmAsr, whisper: str, size: int, words: Counter[str], share: float = 0.0) -> DllmAsr:
    """The model with `size` tokens of Whisper's vocabulary instead of fewer.

    Args:
        model: with Whisper's decoder.
        whisper: transformers checkpoint, folder or Hub id.
        size: tokens, the special ones not counted.
        words: how often each is written.
        share: of Whisper's weights in encoder and decoder.
    """
    fresh = assemble(
        whisper,
        None,
        vocab_size=size,
        max_position_embeddings=model.config.backbone.max_position_embeddings,
        adapter=model.config.adapter,
        words=words,
    )
    published, own = decoder_of(fresh).embed_tokens.weight, decoder_of(model).embed_tokens.weight
    rows = published.clone()
    for token, i in fresh.vocabulary.tokenizer.get_vocab().items():
        if (old := model.vocabulary.tokenizer.token_to_id(token)) is not None:
            rows[i] = own[old]
    for token in (fresh.vocabulary.mask_id, fresh.vocabulary.delete_id):
        published[token] = rows[token]  # Whisper has neither
    grown = DllmAsr(replace(model.config, vocab_size=fresh.vocabulary.size), fresh.vocabulary)
    state = model.state_dict() | {EMBEDDING: rows}
    theirs = fresh.state_dict()
    for name in state if share else ():
        if name.startswith(("encoder.", "backbone.decoder.")):
            state[name] = torch.lerp(state[name], theirs[name], share)
    grown.load_state_dict(grown.state_dict() | state)
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=10_240, help="tokens (default: %(default)s)")
    parser.add_argument("--speech", type=Path, required=True, help="folder of speech shards, from recordings.py")
    parser.add_argument("--sentences", type=Path, help="sentences.jsonl, from sentences.py")
    parser.add_argument(
        "--whisper-share", type=float, default=0.0, help="of Whisper's own weights (default: %(default)s)"
    )
    parser.add_argument("--whisper", default="openai/whisper-tiny.en", help="folder or Hub id")
    arguments = parser.parse_args()
    model = DllmAsr.from_pretrained(arguments.model).float()
    words = written_words(arguments.speech, arguments.sentences)
    grown = larger(model, arguments.whisper, arguments.size, words, arguments.whisper_share)
    cuts = [
        sum(len(v.word(word)) * times for word, times in words.items()) for v in (model.vocabulary, grown.vocabulary)
    ]
    before, now = (cut / words.total() for cut in cuts)
    print(f"tokens a word: {before:.3f} before, {now:.3f} now")
    grown.save_pretrained(arguments.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
