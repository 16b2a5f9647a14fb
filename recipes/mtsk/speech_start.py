"""Where a model of real speech starts: `python speech_start.py MODEL MANIFEST OUT`.

Some hours of speech are too few to find out at once what a sound token is and how to write a sentence. A dLLM-ASR model
of Whisper's shape has learned both, so its decoder becomes the language model (`whisper_llama.py`) and its encoder the
encoder. The projectors begin as the mean of the states of a token, which is what that decoder reads. OUT gets

    llama/    the language model and its tokenizer, a checkpoint of transformers
    whisper/  the encoder, in the layout of transformers' Whisper
    start/    a Llama-MTSK model of both, which writes texts before any training; `speech.yaml` goes on from it

The tokenizer writes each prompt as one token, which the language model reads as the start of a text.

Not in Llama-MTSK (arXiv 2503.06362), which starts from random projectors and a pretrained Llama.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from whisper_llama import BALLAST, EXTRA, llama_of, prefix_row

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.mtsk.sequence import PROMPTS
from tokenthrift.mtsk.training.assembly import AssemblyConfig, assemble
from tokenthrift.reducers.pooling import pool_by_rate

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def tokenizer_of(model: DllmAsr) -> Tokenizer:
    """The pieces of words of a model's tokenizer; behind them its end, a start, and each prompt as one token."""
    data = json.loads(model.vocabulary.tokenizer.to_str())
    special = {token["id"] for token in data["added_tokens"]}
    vocabulary: dict[str, int] = data["model"]["vocab"]
    kept = sorted((t for t, i in vocabulary.items() if i not in special), key=vocabulary.__getitem__)
    added = [EOS, BOS, *PROMPTS.values()]
    data["model"]["vocab"] = {token: i for i, token in enumerate([*kept, *added])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": len(kept) + i, "content": token, **flags} for i, token in enumerate(added)]
    data["pre_tokenizer"]["add_prefix_space"] = True
    return Tokenizer.from_str(json.dumps(data))


@torch.no_grad()
def measured(model: DllmAsr, sounds: Sequence[Tensor], texts: Sequence[str]) -> tuple[float, list[float]]:
    """What `llama_of` must know of some recordings: `audio_norm` and `rms`."""
    decoder = _decoder(model)
    norms = [layer.encoder_attn_layer_norm for layer in decoder.layers] + [decoder.layer_norm]
    seen: list[list[Tensor]] = [[] for _ in norms]

    def note(number: int) -> Any:
        return lambda _, inputs: seen[number].append(inputs[0].square().mean(-1).sqrt().flatten())

    hooks = [norm.register_forward_pre_hook(note(i)) for i, norm in enumerate(norms)]
    lengths = []
    for sound, text in zip(sounds, texts, strict=True):
        memory, counts = pool_by_rate(*model.encode([sound]), 4)
        lengths.append(memory[0].norm(dim=1))
        ids = [model.vocabulary.start_id, *(i for word in text.split() for i in model.vocabulary.word(word))]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        everything = torch.ones(1, int(counts[0]), dtype=torch.bool)
        decoder(torch.tensor([ids]), causal, decoder.context(memory, everything))
    for hook in hooks:
        hook.remove()
    # A hidden state of another recording may be half as large again.
    largest = [1.5 * float(torch.cat(rows).max()) for rows in seen[:-1]]
    return float(torch.cat(lengths).mean()), [*largest, float(torch.cat(seen[-1]).median())]


@torch.no_grad()
def begin_with_means(model: LlamaMtsk) -> None:
    """Projectors that give the mean of a token's states, and markers that nothing but sound looks at."""
    size = model.config.language_model.hidden_size - EXTRA
    same = torch.eye(size)
    for rate, project in zip(model.config.audio_rates, model.audio_proj, strict=True):
        inner, outer = (layer for layer in project if isinstance(layer, nn.Linear))
        if len(inner.weight) < 2 * size:
            raise ValueError(f"a mean needs {2 * size} hidden channels in a projector, not {len(inner.weight)}")
        mean = same.repeat(1, rate) / rate
        inner.weight[: 2 * size] = torch.cat([mean, -mean])  # behind the ReLU its positive and its negative part
        inner.bias[: 2 * size] = 0.0
        outer.weight.zero_()
        outer.weight[:size, : 2 * size] = torch.cat([same, -same], 1)
        outer.bias.copy_(torch.cat([torch.zeros(size), torch.tensor([BALLAST, *[0.0] * (EXTRA - 1)])]))
    assert model.markers is not None
    model.markers.copy_(prefix_row(size).expand_as(model.markers))


def _decoder(model: DllmAsr) -> WhisperDecoder:
    decoder = getattr(model.backbone, "decoder", None)
    if not isinstance(decoder, WhisperDecoder):
        raise SystemExit("the language model of this dLLM-ASR model is not of Whisper's shape")
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dLLM-ASR model with a decoder of Whisper's shape, folder or Hub id")
    parser.add_argument("manifest", type=Path, help="recordings with text and split; a few of `train` are looked at")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    source = DllmAsr.from_pretrained(arguments.model)
    decoder, tokenizer = _decoder(source), tokenizer_of(source)
    rows = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "train" and row["duration"] < 20]
    some = rows[:: max(1, len(rows) // 40)]
    sounds = [read_audio(arguments.manifest.parent / row["audio_filepath"]) for row in some]
    pieces = source.vocabulary.size - 4
    lm = llama_of(
        decoder.state_dict(),
        decoder.num_attention_heads,
        [*range(pieces), source.vocabulary.eos_id],
        source.vocabulary.start_id,
        len(PROMPTS),
        *measured(source, sounds, [row["text"] for row in some]),
    )
    lm.config.bos_token_id, lm.config.eos_token_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    lm.save_pretrained(arguments.out / "llama")
    tokenizer.save(str(arguments.out / "llama/tokenizer.json"))

    sizes = source.config.encoder
    whisper = arguments.out / "whisper"
    whisper.mkdir(parents=True, exist_ok=True)
    names = {
        "d_model": sizes.hidden_size,
        "encoder_layers": sizes.num_hidden_layers,
        "encoder_attention_heads": sizes.num_attention_heads,
        "encoder_ffn_dim": sizes.intermediate_size,
        "num_mel_bins": sizes.num_mel_bins,
    }
    (whisper / "config.json").write_text(json.dumps({"model_type": "whisper", **names}, indent=2))
    state = {f"model.encoder.{name}": value.contiguous() for name, value in source.encoder.state_dict().items()}
    save_file(state, whisper / "model.safetensors", {"format": "pt"})

    model = assemble(
        AssemblyConfig(
            language_model=str(arguments.out / "llama"),
            whisper=str(whisper),
            tasks=("asr",),
            audio_rates=tuple(arguments.rates),
            strategy="MSS",
            bottleneck=32,
            lora_scale=1.0,
            compression="stack",
            projector_hidden_size=arguments.projector,
            projector_norm=False,
            include_frozen=True,
        )
    )
    begin_with_means(model)
    model.save_pretrained(arguments.out / "start")
    print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M weights of the language model")


if __name__ == "__main__":
    main()
