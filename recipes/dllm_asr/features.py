"""Speech shards to cached encoder states: `python features.py SPEECH OUT --whisper CHECKPOINT [--noise DIR]`.

The encoder is frozen, so its states are computed once. Every clip of a shard is used once a pass: clips of one voice
are joined, with silence between them, into utterances of up to 20 s (a third stay single), then augmented: speed 0.9 to
1.1, gain, white noise or recorded noise at 5 to 30 dB, room impulse responses. The states (50 a second, fp16) of all
utterances of a shard go end to end into `NNNN-VOICE-PASS.safetensors` with `offset`; the texts are in its metadata.
Development sentences never meet training sentences: they go, without augmentation, to `dev-*`. Shards are skipped where
present and written atomically; run the command again as more speech arrives. `OUT/made.json` says with which encoder
and seed; others need a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from safetensors.torch import load_file, save_file

from tokenthrift.sources import fetch
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.whisper import STATE_SAMPLES, WhisperEncoder, encoder_weights, log_mel, pad_mels

RATE = 16_000
PASS_SECONDS = 30  # what one pass of the encoder holds; longer clips are left out
Utterance = tuple[torch.Tensor, str]


def load_encoder(whisper: str) -> WhisperEncoder:
    """The encoder of a transformers Whisper checkpoint, from a folder or the Hub."""
    folder = fetch(whisper, ("config.json", "model.safetensors"))
    c = json.loads((folder / "config.json").read_text())
    heads, ffn, bins = c["encoder_attention_heads"], c["encoder_ffn_dim"], c["num_mel_bins"]
    encoder = WhisperEncoder(c["d_model"], c["encoder_layers"], heads, ffn, bins)
    encoder.load_state_dict(encoder_weights(load_file(folder / "model.safetensors")))
    return encoder.eval()


def join(clips: list[Utterance], rng: random.Random, limit: float) -> list[Utterance]:
    """Clips of one voice into utterances: single ones and strings up to a drawn length of at most `limit` seconds."""
    rng.shuffle(clips)
    out, i = [], 0
    while i < len(clips):
        goal = 0.0 if rng.random() < 0.33 else rng.uniform(3, limit)
        parts, words, seconds = [], [], 0.0
        while i < len(clips) and (not parts or seconds + len(clips[i][0]) / RATE + 0.3 < goal):
            if parts:
                parts.append(torch.zeros(int(rng.uniform(0.0, 0.5) * RATE)))
            parts.append(clips[i][0])
            words.append(clips[i][1])
            seconds = sum(map(len, parts)) / RATE
            i += 1
        spare = max(0.0, PASS_SECONDS - sum(map(len, parts)) / RATE)
        edges = [torch.zeros(int(rng.uniform(0.0, min(0.3, spare / 2)) * RATE)) for _ in range(2)]
        out.append((torch.cat([edges[0], *parts, edges[1]]), " ".join(words)))
    return out


def augment(
    audio: torch.Tensor, rng: random.Random, noises: list[torch.Tensor], rooms: list[torch.Tensor]
) -> torch.Tensor:
    """Speed, room, noise and gain, each with its own chance; no speech is cut, and the result is within [-1, 1]."""
    speed = rng.choice([0.9, 0.95, 1.0, 1.05, 1.1])
    if speed != 1.0 and len(audio) / speed <= 25 * RATE:
        audio = AF.resample(audio, int(RATE * speed), RATE)
    if rooms and rng.random() < 0.2:
        room = rng.choice(rooms)
        audio = AF.fftconvolve(audio, room / room.norm())[: len(audio)]
    if rng.random() < 0.5:
        seed = torch.Generator().manual_seed(rng.getrandbits(31))
        noise = torch.randn(len(audio), generator=seed)
        if noises and rng.random() < 0.7:
            source = rng.choice(noises)
            start = rng.randrange(len(source))
            noise = source.roll(-start).repeat(len(audio) // len(source) + 1)[: len(audio)]
        power = audio.square().mean() / noise.square().mean().clamp_min(1e-8)
        audio = audio + noise * (power * 10 ** (-rng.uniform(5, 30) / 10)).sqrt()
    peak = audio.abs().max().clamp_min(1e-4)
    return audio / peak * rng.uniform(0.1, 0.9)


@torch.inference_mode()
def encode(
    encoder: WhisperEncoder, utterances: list[Utterance], seconds: float = 40.0
) -> tuple[list[torch.Tensor], list[str]]:
    """States `(n, width)` in fp16 of each utterance, in batches of at most `seconds` of padded audio."""
    order = sorted(range(len(utterances)), key=lambda i: len(utterances[i][0]))
    states: list[torch.Tensor] = [torch.empty(0)] * len(utterances)
    while order:
        longest = len(utterances[order[-1]][0]) / RATE
        rows = [order.pop() for _ in range(min(len(order), max(1, int(seconds / longest))))]
        mels, lengths = pad_mels([log_mel(utterances[i][0], encoder.conv1.in_channels) for i in rows])
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=cpu_has_bf16()
        ):  # half the time; the rounding (2 %) is far below the augmentation
            encoded = encoder(mels, lengths)
        for i, row, n in zip(rows, encoded, lengths.tolist(), strict=True):
            states[i] = row[:n].half()
    return states, [text for _, text in utterances]


def save(path: Path, states: list[torch.Tensor], texts: list[str]) -> None:
    offset = torch.tensor(np.cumsum([0, *map(len, states)]))
    partial = path.with_suffix(".partial")
    save_file({"states": torch.cat(states), "offset": offset}, partial, {"texts": json.dumps(texts)})
    os.replace(partial, path)


def read_folder(folder: Path | None, pattern: str) -> list[torch.Tensor]:
    """Recordings of a folder at 16 kHz; none without a folder. A folder that is named must be there."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder")
    clips = [soundfile.read(p, dtype="float32", always_2d=True) for p in sorted(folder.glob(pattern))]
    return [AF.resample(torch.from_numpy(x.mean(1)), rate, RATE) for x, rate in clips]


def fingerprint(encoder: WhisperEncoder) -> int:
    """Tells one encoder's weights from another's."""
    return zlib.crc32(b"".join(weight.numpy().tobytes() for weight in encoder.state_dict().values()))


def check_made(path: Path, how: dict[str, int]) -> None:
    """States of two encoders, or of two seeds under the same names, must not meet in one folder."""
    if not path.exists():
        path.write_text(json.dumps(how) + "\n")
    elif (found := json.loads(path.read_text())) != how:
        raise SystemExit(f"{path.parent} was made with {found}, not with {how}: give another folder")


def passes_of(shard: Path, real: int) -> int:
    return real if shard.name.startswith("9") else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whisper", default="openai/whisper-tiny.en", help="transformers checkpoint: folder or Hub id")
    parser.add_argument("--noise", type=Path, help="folder of noise*.flac and rir*.flac")
    parser.add_argument(
        "--real-passes", type=int, default=5, help="passes over real recordings, each joined and augmented anew"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one joins and augments all anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--part", default="0/1", help="i/n: only every n-th shard, from the i-th; for several processes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(arguments.whisper)
    check_made(arguments.out / "made.json", {"encoder": fingerprint(encoder), "seed": arguments.seed})
    noises, rooms = read_folder(arguments.noise, "noise*.flac"), read_folder(arguments.noise, "rir*.flac")
    part, parts = map(int, arguments.part.split("/"))
    for shard in sorted(arguments.speech.glob("*.npz"), reverse=True):
        if int(shard.name[:4]) % parts != part:
            continue
        for number in range(passes_of(shard, arguments.real_passes)):
            target = arguments.out / f"{shard.stem}-{number}.safetensors"
            if target.exists():
                continue
            started = time.perf_counter()
            with np.load(shard) as data:
                audio, offset, rows = torch.from_numpy(data["audio"]), data["offset"], json.loads(str(data["rows"]))
            clips = [
                (audio[a:b].float() / 32768, r["text"], r["split"])
                for a, b, r in zip(offset, offset[1:], rows, strict=False)
                if b - a <= PASS_SECONDS * RATE
            ]
            name = zlib.crc32(target.name.encode())
            dev = join([(a, t) for a, t, s in clips if s == "dev"], random.Random(name), 12.0)  # the same for all seeds
            rng = random.Random(name + arguments.seed)
            if dev and number == 0:
                save(arguments.out / f"dev-{shard.stem}.safetensors", *encode(encoder, dev))
            train = [
                (augment(a, rng, noises, rooms), t)
                for a, t in join([(a, t) for a, t, s in clips if s == "train"], rng, 20.0)
            ]
            if not train:
                continue
            states, texts = encode(encoder, train)
            save(target, states, texts)
            minutes, took = sum(map(len, states)) * STATE_SAMPLES / RATE / 60, time.perf_counter() - started
            left = f"; {len(rows) - len(clips)} clips too long" if len(rows) > len(clips) else ""
            print(f"{target.name}: {len(states)} utterances, {minutes:.1f} min in {took:.0f} s{left}", flush=True)


if __name__ == "__main__":
    main()
