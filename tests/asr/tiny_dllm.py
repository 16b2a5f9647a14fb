"""Tiny dLLM-ASR models, tokenizers and checkpoints with random weights, made with the libraries of the real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tokenthrift.dllm_asr.config import (
    AdapterConfig,
    BackboneConfig,
    DecodeConfig,
    DllmAsrConfig,
    DraftConfig,
    EncoderConfig,
)
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.vocabulary import Vocabulary, trim

Family = Literal["whisper", "bert", "modernbert", "llama"]

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "Please leave a message after the tone, and don't forget your number.",
    "one two three four five six seven eight nine zero",
    "She sells sea shells; it's the other one that they'd rather have sold.",
    "press the pound key to go on or the star key to stop",
    "there is nothing there",
]
WIDTH, LAYERS, HEADS, FFN = 32, 2, 4, 64


def write_bpe(path: Path, *, merges_as_strings: bool = False) -> Path:
    """A byte-level BPE tokenizer file in the manner of GPT-2 and Whisper; older files write merges as strings."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    data = json.loads(tokenizer.to_str())
    if merges_as_strings:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_wordpiece(path: Path) -> Path:
    """A WordPiece tokenizer file in the manner of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = list("abcdefghijklmnopqrstuvwxyz'.,;")
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # Every letter also inside of a word, as in BERT's own list.
    tokenizer.train_from_iterator([*LINES * 4, *(f"a{letter}" for letter in alphabet[:26])], trainer)
    tokenizer.save(str(path))
    return path


def write_whisper(folder: Path, special: Sequence[str] = (), vocab_size: int | None = None) -> Path:
    """A transformers checkpoint of a tiny Whisper, with its tokenizer and further special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(write_bpe(folder / "tokenizer.json")))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=vocab_size or tokenizer.get_vocab_size(),
        d_model=WIDTH,
        **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": FFN for side in ("encoder", "decoder")},
        max_target_positions=160,
        init_std=0.2,
        decoder_start_token_id=(end or 0) + 1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@cache
def vocabulary(size: int = 120) -> Vocabulary:
    """A trimmed byte-level BPE."""
    with TemporaryDirectory() as folder:
        return trim(write_bpe(Path(folder) / "tokenizer.json"), size)[0]


def tiny_config(family: Family, pools: tuple[int, ...] = (), **decode: Any) -> DllmAsrConfig:
    """Whisper's decoder reads 25 states a second as they are; the others 12.5, through the convolution, as a prefix."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
    }
    return DllmAsrConfig(
        vocab_size=vocabulary().size,
        encoder=EncoderConfig(**sizes),
        adapter=AdapterConfig(pool=2, stride=1 if family == "whisper" else 2, pools=pools),
        draft=DraftConfig(**{**sizes, "num_hidden_layers": 1}),
        backbone=BackboneConfig(family=family, max_position_embeddings=128, **sizes),
        decode=DecodeConfig(**decode),
    )


def tiny_model(family: Family = "whisper", seed: int = 0, pools: tuple[int, ...] = (), **decode: Any) -> DllmAsr:
    """A random model whose draft and denoiser write different texts for different audio, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DllmAsr(tiny_config(family, pools, **decode), vocabulary())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Fresh weights are so small that nothing would depend on the audio, and nothing would be sure.
                chooses = len(parameter) in (vocabulary().size, model.draft.output.out_features)
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 * (9 if chooses else 1))
        # Blanks and spaces, so that drafts are of several words.
        model.draft.output.bias.view(2, -1)[:, :2] += 6.0
    return model.eval()


def spoken_states(text: str, seed: int = 0) -> Tensor:
    """Encoder states that say a text: five for each letter, of which a learner can tell the letter."""
    letters = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(99))
    states = letters[torch.tensor([*text.encode()])].repeat_interleave(5, 0)
    return states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))


def write_shard(path: Path, texts: list[str]) -> Path:
    """A shard of encoder states in the format of the recipe."""
    states = [spoken_states(text, seed).half() for seed, text in enumerate(texts)]
    offset = torch.tensor([0, *map(len, states)]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"states": torch.cat(states), "offset": offset}, path, {"texts": json.dumps(texts)})
    return path


def speech(seconds: float, seed: int = 0) -> Tensor:
    """Samples at 16 kHz that change every tenth of a second: tones of drawn pitch and loudness over faint noise."""
    count = round(seconds * 16_000)
    generator = torch.Generator().manual_seed(seed)
    parts = count // 1600 + 1
    pitch = 80 * 50 ** torch.rand(parts, generator=generator)
    loudness = 10 ** (-2 * torch.rand(parts, generator=generator))
    phase = 2 * torch.pi * pitch.repeat_interleave(1600)[:count].double().cumsum(0) / 16_000
    tone = phase.sin().float() * loudness.repeat_interleave(1600)[:count] * 0.5
    return tone + 1e-3 * torch.randn(count, generator=generator)
