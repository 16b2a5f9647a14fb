"""Scripts of the Llama-MTSK recipe for real speech as modules, and a small Whisper for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.asr.tiny_dllm import write_bpe
from tests.recipes.test_mtsk_recipes import script
from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.mtsk.sequence import Encoded

start, decoder = script("speech_start"), script("speech_decoder")
TEXTS = ("a hawk brooded on the far corner", "the two men shook hands", "erie is to the north", "that was one night")
RATES = (2, 4)
SILENCE = ("--trailing-silence", 0.5)
SIZES = ("--projector", 80, "--rates", *RATES, "--vocabulary", 120)


def write_whisper(folder: Path) -> None:
    """A random Whisper whose decoder can be written as a Llama: 32 + 6 channels, two heads, units for all positions."""
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(write_bpe(folder / "tokenizer.json")))
    end = tokenizer.get_vocab()["<|endoftext|>"]
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 256))}
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        **sides,
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
        max_target_positions=100,
        init_std=0.2,
        decoder_start_token_id=end + 1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config)
        for table in (model.model.decoder.embed_tokens.weight, model.model.decoder.embed_positions.weight):
            table.copy_(torch.randn_like(table))
            table -= table.mean(1, keepdim=True)
        model.save_pretrained(folder)


def losses_of(whisper: Any, reader: torch.nn.Module, model: LlamaMtsk, encoded: Encoded) -> list[list[float]]:
    """Of a reader and a model, for each text at each scale."""
    found = []
    for text in TEXTS:
        read, written = decoder.rows(whisper, [text])
        for rates in model.config.scales:
            with torch.no_grad():
                scores = reader(encoded, read, rates)[0, 1:]
                own = float(model.loss(encoded, [model.token_ids(text)], rates))
            found.append([float(F.cross_entropy(scores, written[0, 1:])), own])
    return found
