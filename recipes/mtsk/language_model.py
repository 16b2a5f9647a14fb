"""A small Llama with random weights and a tokenizer of the phrases: `python language_model.py PHRASES.jsonl OUT`.

Two cores cannot train around a language model of a billion weights. This one is a few million, has the layout of
transformers, and learns to write down speech while it is trained (`recognizer.yaml`); from then on it is frozen, as the
paper's Llama is. The tokenizer is byte-pair encoding of the training phrases, with the prompts' words among them.
`--of MODEL` instead takes tokenizer and language model out of a Llama-MTSK model that was trained before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.sequence import PROMPTS

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Pieces of words, with a mark at the start of each word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", BOS, EOS], show_progress=False)
    # Often enough that each word of a prompt is one token.
    tokenizer.train_from_iterator([*texts, *list(PROMPTS.values()) * 2000], trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phrases", type=Path, nargs="?")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=800)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--of", metavar="MODEL", help="a Llama-MTSK model; nothing is random then, and no phrases are read"
    )
    arguments = parser.parse_args()
    if arguments.of is not None:
        trained = LlamaMtsk.from_pretrained(arguments.of)
        config = trained.config
        lm = trained.language_model
        lm.config.bos_token_id, lm.config.eos_token_id = config.bos_id, config.eos_id
        lm.save_pretrained(arguments.out)
        trained.tokenizer.save(str(arguments.out / "tokenizer.json"))
        return
    if arguments.phrases is None:
        parser.error("give phrases, or --of MODEL")
    rows = [json.loads(line) for line in arguments.phrases.read_text().splitlines()]
    texts = [row["text"] for row in rows if row["split"] == "train"]
    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    width = arguments.width
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        initializer_range=width**-0.5,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.out)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts) / len(texts)
    prompt = {text: len(tokenizer.encode(text).ids) for text in PROMPTS.values()}
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights, {tokens:.1f} tokens a phrase, {prompt}")


if __name__ == "__main__":
    main()
