"""Encoder states, made once: `python states.py SPEECH OUT --whisper CHECKPOINT --avhubert FOLDER --noise DIR DIR`.

Both encoders are frozen, so training reads their states. Every training utterance is in a room or not, with
noise or babble at a level from -5 dB to clean, drawn by its number; its mouth is drawn, cropped and encoded. A shard
of speech becomes a shard of states (`CachedStates`), fp16. Development clips are encoded from
their files, every second one with noise at 0 dB. What is there is skipped, so a stopped run goes on and new speech is
added.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lip_encoder import rows_of
from safetensors.torch import load_file, save_file
from talk import pictures
from torch import Tensor, nn

from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, avhubert_config, normalize
from tokenthrift.mtsk.audiovisual.noise import mix
from tokenthrift.mtsk.external import AVHUBERT_FILE
from tokenthrift.mtsk.training.augmentation import Augmentation
from tokenthrift.mtsk.training.clips import ManifestClips
from tokenthrift.sources import fetch
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.whisper import WhisperEncoder, encode_recordings, encoder_weights


class AudioStates:
    """Whisper's encoder, one recording at a time."""

    def __init__(self, whisper: str) -> None:
        folder = fetch(whisper, ("config.json", "model.safetensors"))
        c = json.loads((folder / "config.json").read_text())
        names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
        self.num_mel_bins = c["num_mel_bins"]
        self.whisper = WhisperEncoder(*(c[name] for name in names)).eval()
        self.whisper.load_state_dict(encoder_weights(load_file(folder / "model.safetensors")))

    @torch.inference_mode()
    def encode(self, sounds: Sequence[Tensor], trailing_silence: float = 0.0) -> list[Tensor]:
        """fp16 states of each recording, computed in bf16 where the processor has it."""
        out = []
        for sound in sounds:
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                states, _ = encode_recordings(self.whisper, [sound], self.num_mel_bins, trailing_silence)
            out.append(states[0].half())
        return out


def read_avhubert(source: str) -> AvHubert:
    """A visual encoder from `avhubert.safetensors` of a folder or Hub id."""
    weights = load_file(fetch(source, (AVHUBERT_FILE,)) / AVHUBERT_FILE)
    sizes = avhubert_config(weights)
    width, layers, heads = sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads
    model = AvHubert(width, layers, heads, sizes.intermediate_size, sizes.channels).eval()
    model.load_state_dict(weights)
    return model


class Seen(nn.Module):
    """In place of a visual encoder's convolutions: hands on what they saw, (B, T, 1, C)."""

    def forward(self, video: Tensor, valid: Tensor) -> Tensor:
        return video[valid][:, 0]


class VideoStates:
    """A visual encoder, in bf16 where the processor has it."""

    def __init__(self, avhubert: str) -> None:
        self.avhubert = read_avhubert(avhubert)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """fp16 states of one clip of mouth crops."""
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            states: Tensor = self.avhubert(normalize(frames)[None])[0].half()
        return states


class Encoders:
    """Whisper and the visual encoder."""

    def __init__(self, whisper: str, avhubert: str) -> None:
        self.audio_states = AudioStates(whisper).encode
        self.video_states = VideoStates(avhubert).encode


def options(about: str | None, source: str, *, lips: bool = True) -> argparse.ArgumentParser:
    """Those of a script that writes states of a `source`, its first argument; with `lips`, of a visual encoder too."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(source, type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whisper", default="openai/whisper-tiny.en")
    if lips:
        parser.add_argument("--avhubert", required=True, help="folder or Hub id of a visual encoder")
    parser.add_argument("--noise", nargs="+", default=[], help="folders of noise*.flac and rir*.flac")
    return parser


def augmentation_of(folders: Sequence[str], crowd: Path | None) -> Augmentation:
    """Half of the noise is a crowd, as in the published training; the rest is what rooms and machines make."""
    recorded = Augmentation.from_folders(folders)
    voices = [] if crowd is None else [read_audio(crowd)] * max(1, len(recorded.noises))
    return Augmentation([*voices, *recorded.noises], recorded.rooms)


def save_states(
    path: Path, streams: Mapping[str, list[Tensor]], texts: list[str], trailing_silence: float = 0.0
) -> None:
    """A shard for `CachedStates`; `streams` has the states of each item by "audio" and "video"."""
    tensors = {name: torch.cat(rows) for name, rows in streams.items()}
    for name, rows in streams.items():
        tensors[f"{name}_offset"] = torch.tensor(np.cumsum([0, *map(len, rows)]))
    said = {"texts": json.dumps(texts), "trailing_silence": str(trailing_silence)}
    save_file(tensors, path.with_suffix(".partial"), said)
    os.replace(path.with_suffix(".partial"), path)


def train_shard(encoders: Encoders, shard: Path, target: Path, augmentation: Augmentation) -> int:
    with np.load(shard) as data:
        audio, offset = torch.from_numpy(data["audio"]), data["offset"]
    rows = [row for row, _ in rows_of(shard)]
    rng = random.Random(zlib.crc32(target.name.encode()))
    sounds, lips = [], []
    for row, a, b in zip(rows, offset, offset[1:], strict=False):
        sounds.append(augmentation.noisy(audio[a:b].float() / 32768, rng))
        frames = pictures(row, int(b - a), 92)
        top, left = rng.randrange(5), rng.randrange(5)
        lips.append(encoders.video_states(frames[:, top : top + 88, left : left + 88]))
    save_states(target, {"audio": encoders.audio_states(sounds), "video": lips}, [row["text"] for row in rows])
    return len(rows)


def main() -> None:
    parser = options(__doc__, "speech")
    parser.add_argument("--limit", type=int, default=10_000, help="training shards to encode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoders = Encoders(arguments.whisper, arguments.avhubert)
    for part in ("train", "dev"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    augmentation = augmentation_of(arguments.noise, arguments.speech / "babble" / "train.flac")
    for kind in sorted(p.name for p in (arguments.speech / "dev").iterdir() if p.is_dir()):
        target = arguments.out / "dev" / f"{kind}.safetensors"
        if target.exists():
            continue
        data = ManifestClips(arguments.speech / "dev" / kind / "manifest.jsonl")
        sounds, lips, rng = [], [], random.Random(0)
        for i in range(len(data)):
            clip = data[i]
            if clip.audio is None or clip.video is None:
                raise ValueError(f"a clip of {kind} lacks sound or pictures")
            noise = augmentation.noise(len(clip.audio), rng)
            sounds.append(mix(clip.audio, noise, 0.0) if i % 2 else clip.audio)
            lips.append(encoders.video_states(clip.video))
        save_states(target, {"audio": encoders.audio_states(sounds), "video": lips}, data.texts)
    for shard in sorted((arguments.speech / "train").glob("*.npz"))[: arguments.limit]:
        target = arguments.out / "train" / f"{shard.stem}.safetensors"
        if not target.exists():
            began = time.process_time()
            count = train_shard(encoders, shard, target, augmentation)
            print(f"{target.name}: {count} utterances, {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
