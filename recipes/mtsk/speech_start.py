"""Where a model of real speech starts: `python speech_start.py WHISPER MANIFEST OUT`.

Some hours of speech are too few to find out at once what a sound token is and how to write a sentence. The decoder of
Whisper knows both, so it becomes the language model (`whisper_llama.py`). The projectors begin as the mean of the
states of a token, or, with `--taught`, decoder and projectors are those that `speech_decoder.py` has taught to read
few tokens. OUT gets

    llama/    the language model and its tokenizer, a checkpoint of transformers
    start/    a Llama-MTSK model of it and Whisper's encoder, which writes texts before any training; `speech.yaml` goes
              on from it

The vocabulary is cut to pieces of lower-case words, as transcripts of speech corpora are written. `</audio>` is the
first token of Whisper's texts, and each prompt is one token, their second: no timestamps.

Not in Llama-MTSK (arXiv 2503.06362), which starts from random projectors and a pretrained Llama.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lip_encoder import SHRINK
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from whisper_llama import BALLAST, EXTRA, llama_of, part, prefix_row

from tokenthrift.backbones.whisper_decoder import WhisperDecoder, decoder_weights
from tokenthrift.dllm_asr.vocabulary import Vocabulary, trim
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.mtsk.sequence import MARKERS, PROMPTS
from tokenthrift.mtsk.training.assembly import AssemblyConfig, assemble
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.sources import fetch
from tokenthrift.whisper import WhisperEncoder, encode_recordings, encoder_weights

FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of Whisper
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
QUOTES = ("\u0120'", "''", "\u0120''")  # which transcripts do not have, and after which a text may be nothing else
ENGLISH = 51_864  # tokens; a Whisper of many languages has more
POSITIONS = 256  # at most, of Whisper's 448: 30 s of speech are about 100 tokens


class Whisper:
    """Encoder and decoder of a Whisper checkpoint, with the tokens that matter here.

    Attributes:
        vocabulary: of lower-case words; its ids are those of the decoder.
        end: token behind a text.
        begin: the two tokens before a text, the last ones of the decoder.

    Args:
        folder: config.json, model.safetensors and tokenizer.json of an English Whisper.
        vocabulary: most tokens to keep of its own.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = [whole.token_to_id(f"<|{name}|>") for name in ("endoftext", "startoftranscript", "notimestamps")]
        if None in found or sizes["vocab_size"] > ENGLISH:
            raise SystemExit("this takes an English Whisper, whose texts begin with two tokens")
        self.vocabulary, kept = trim(folder / "tokenizer.json", vocabulary)
        self.end, *begin = range(len(kept), len(kept) + 3)
        self.begin = (begin[0], begin[1])
        side = [sizes[f"encoder_{name}"] for name in ("layers", "attention_heads", "ffn_dim")]
        self.encoder = WhisperEncoder(sizes["d_model"], *side, sizes["num_mel_bins"]).eval()
        self.encoder.load_state_dict(encoder_weights(state))
        positions = min(POSITIONS, sizes["max_target_positions"])
        side = [sizes[f"decoder_{name}"] for name in ("layers", "attention_heads", "ffn_dim")]
        self.decoder = WhisperDecoder(len(kept) + 3, sizes["d_model"], *side, positions).eval()
        self.decoder.load_state_dict(decoder_weights(state, [*kept, *map(int, found)], 0, positions))

    def states(self, sound: Tensor, trailing_silence: float) -> tuple[Tensor, Tensor]:
        """States (1, N, D) of a recording, read with so many seconds of silence behind it, and their number (1,)."""
        return encode_recordings(self.encoder, [sound], self.encoder.conv1.in_channels, trailing_silence)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text of lower-case words."""
        return [i for word in text.split() for i in self.vocabulary.word(word)]


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """The pieces of words of a vocabulary; behind them an end, a start, and each prompt as one token."""
    data = json.loads(vocabulary.tokenizer.to_str())
    special = {token["id"] for token in data["added_tokens"]}
    pieces: dict[str, int] = data["model"]["vocab"]
    kept = sorted((t for t, i in pieces.items() if i not in special), key=pieces.__getitem__)
    added = [EOS, BOS, *PROMPTS.values()]
    data["model"]["vocab"] = {token: i for i, token in enumerate([*kept, *added])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": len(kept) + i, "content": token, **flags} for i, token in enumerate(added)]
    data["pre_tokenizer"]["add_prefix_space"] = True
    return Tokenizer.from_str(json.dumps(data))


@torch.no_grad()
def projector(rate: int, weight: Tensor, hidden_size: int, bias: Tensor | None = None) -> nn.Sequential:
    """Stacked states (rate * W) to the mean of what is read from each, by two layers; the first is wider than needed.

    Args:
        rate: states of a token.
        weight: (D, W) what is read from a state; the identity for the state itself.
        hidden_size: between the layers.
        bias: (D,), zero if not given.
    """
    size = len(weight)
    if hidden_size < 2 * size:
        raise ValueError(f"a mean needs {2 * size} hidden channels in a projector, not {hidden_size}")
    inner, outer = nn.Linear(rate * weight.shape[1], hidden_size), nn.Linear(hidden_size, size)
    mean, same = weight.repeat(1, rate) / rate, torch.eye(size)
    offset = torch.zeros(size) if bias is None else bias
    inner.weight[: 2 * size] = torch.cat([mean, -mean])  # behind the ReLU its positive and its negative part
    inner.bias[: 2 * size] = torch.cat([offset, -offset])
    outer.weight.zero_()
    outer.weight[:, : 2 * size] = torch.cat([same, -same], 1)
    outer.bias.zero_()
    return nn.Sequential(inner, nn.ReLU(), outer)


def projector_of(state: Mapping[str, Tensor]) -> nn.Sequential:
    """A projector from its tensors."""
    inner, outer = state["0.weight"], state["2.weight"]
    made = nn.Sequential(nn.Linear(*inner.mT.shape), nn.ReLU(), nn.Linear(*outer.mT.shape))
    made.load_state_dict(state)
    return made


@torch.no_grad()
def measured(
    whisper: Whisper,
    project: nn.Module,
    rate: int,
    sounds: Sequence[Tensor],
    texts: Sequence[str],
    trailing_silence: float,
) -> tuple[float, list[float]]:
    """What `llama_of` must know of some recordings: `audio_norm` and `rms`."""
    norms = [layer.encoder_attn_layer_norm for layer in whisper.decoder.layers] + [whisper.decoder.layer_norm]
    seen: list[list[Tensor]] = [[] for _ in norms]

    def note(number: int) -> Any:
        return lambda _, inputs: seen[number].append(inputs[0].square().mean(-1).sqrt().flatten())

    hooks = [norm.register_forward_pre_hook(note(i)) for i, norm in enumerate(norms)]
    lengths = []
    for sound, text in zip(sounds, texts, strict=True):
        stacked, counts = pool_by_rate(*whisper.states(sound, trailing_silence), rate, "stack")
        memory = project(stacked)
        lengths.append(memory[0].norm(dim=1))
        ids = [*whisper.begin, *whisper.ids(text)]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        everything = torch.ones(1, int(counts[0]), dtype=torch.bool)
        whisper.decoder(torch.tensor([ids]), causal, whisper.decoder.context(memory, everything))
    for hook in hooks:
        hook.remove()
    # A hidden state of another recording may be half as large again.
    largest = [1.5 * float(torch.cat(rows).max()) for rows in seen[:-1]]
    return float(torch.cat(lengths).mean()), [*largest, float(torch.cat(seen[-1]).median())]


@torch.no_grad()
def begin_with(model: LlamaMtsk, given: Sequence[nn.Module], first: Tensor) -> None:
    """Gives a model its projectors, with the flags of sound, and markers that nothing but sound looks at.

    Args:
        model: of sound, or of sound and lips.
        given: for each rate of sound, then of lips, a projector to the width of Whisper.
        first: (H,) embedding of the first token of a text, which stands behind the sound.
    """
    size = model.config.language_model.hidden_size - EXTRA
    own = [*model.audio_proj, *getattr(model, "video_proj", ())]
    for one, project in zip(given, own, strict=True):
        (inner, outer), (own_inner, own_outer) = (
            [layer for layer in layers if isinstance(layer, nn.Linear)] for layers in (one.children(), project)
        )
        own_inner.load_state_dict(inner.state_dict())
        own_outer.weight.zero_()
        own_outer.weight[:size] = outer.weight
        own_outer.bias.copy_(torch.cat([outer.bias, torch.tensor([BALLAST, *[0.0] * (EXTRA - 1)])]))
    assert model.markers is not None
    model.markers.copy_(prefix_row(size).expand_as(model.markers))
    model.markers[MARKERS.index("</audio>")] = first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="an English Whisper, folder or Hub id")
    parser.add_argument("manifest", type=Path, help="recordings with text and split; a few of `train` are looked at")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=16_000, help="most tokens to keep")
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector")
    parser.add_argument("--trailing-silence", type=float, default=0.0, help="seconds, as of speech_states.py")
    parser.add_argument("--avhubert", help="OUT of speech_decoder.py where it read lips; none for sound alone")
    parser.add_argument("--video-rates", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--taught", type=Path, help="decoder and projectors of speech_decoder.py, of the same sizes")
    arguments = parser.parse_args()
    if arguments.avhubert is not None and arguments.taught is None:
        parser.error("--avhubert needs --taught: lips have no meaning before")
    torch.manual_seed(0)
    whisper = Whisper(fetch(arguments.whisper, FILES), arguments.vocabulary)
    tokenizer = tokenizer_of(whisper.vocabulary)
    rows = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "train" and row["duration"] < 20]
    some = rows[:: max(1, len(rows) // 40)]
    sounds = [read_audio(arguments.manifest.parent / row["audio_filepath"]) for row in some]
    size = whisper.encoder.conv2.out_channels
    own: list[nn.Module] = [projector(rate, torch.eye(size), arguments.projector) for rate in arguments.rates]
    if arguments.taught is not None:
        taught = load_file(arguments.taught)
        whisper.decoder.load_state_dict(part(taught, "decoder."))
        names = [f"audio_proj.{k}." for k in range(len(arguments.rates))]
        own = [projector_of(part(taught, name)) for name in names]
        if arguments.avhubert is not None:
            if Path(arguments.avhubert).resolve() != arguments.taught.parent.resolve():
                parser.error("--taught has read lips by the visual encoder beside it: give its folder to --avhubert")
            own += [projector_of(part(taught, f"video_proj.{k}.")) for k in range(len(arguments.video_rates))]
    texts = [row["text"] for row in some]
    # The norms of other rates are near enough: `BALLAST` is large beside them.
    norms = measured(whisper, own[0], arguments.rates[0], sounds, texts, arguments.trailing_silence)
    lm, first = llama_of(
        whisper.decoder.state_dict(),
        whisper.decoder.num_attention_heads,
        range(whisper.end + 1),
        whisper.begin,
        len(PROMPTS),
        *norms,
    )
    lm.config.bos_token_id, lm.config.eos_token_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    lm.save_pretrained(arguments.out / "llama")
    tokenizer.save(str(arguments.out / "llama/tokenizer.json"))
    model = assemble(
        AssemblyConfig(
            language_model=str(arguments.out / "llama"),
            whisper=arguments.whisper,
            trailing_silence=arguments.trailing_silence,
            suppress_tokens=tuple(token for token in QUOTES if tokenizer.token_to_id(token) is not None),
            avhubert=arguments.avhubert,
            video_shrink=SHRINK,
            video_positions=True,  # the language model counts none of sound and video
            tasks=("asr",) if arguments.avhubert is None else ("asr", "avsr"),
            audio_rates=tuple(arguments.rates),
            video_rates=tuple(arguments.video_rates),
            strategy="MSS",
            bottleneck=32,
            lora_scale=1.0,
            compression="stack",
            projector_hidden_size=arguments.projector,
            projector_norm=False,
            include_frozen=True,
        )
    )
    begin_with(model, own, first)
    model.save_pretrained(arguments.out / "start")
    print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M weights of the language model")


if __name__ == "__main__":
    main()
