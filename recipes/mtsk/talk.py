"""Synthetic audio-visual speech: `python talk.py PHRASES.jsonl OUT`. Rendered mouths, text-to-speech voices.

eSpeak NG speaks each phrase and says at which sample every phoneme starts; the mouth is moved by these (`visemes.py`)
and drawn by `mouth.py`. Training speech goes to shards `train/NNNN.npz`: `audio` (int16, 16 kHz, end to end), `offset`,
and `rows` (JSON: text, kind, speaker, seed, and the phonemes as [second, name]). The pictures are a function of a row
(`pictures`), so they are drawn when needed and not stored. Development and test clips are written as ordinary files,
FLAC and lossless video, with a `manifest.jsonl`; `babble/` gets the noise of 25 further speakers.

Speakers (accent, voice, pitch, rate, face) are of one split only, voices too, and so are texts (`phrases.py`). What is
there is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from espeak import Spoken, Voice, speak
from mouth import draw, face_of
from torch import Tensor
from visemes import FPS, homophene_bound, mouth_track, viseme_string

RATE = 16_000
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")
# Variants of eSpeak's voice: no speaker is in two splits.
VARIANTS = {
    "train": "m1 m2 m3 m5 m6 m8 f1 f2 f3 f5 Andy Gene Lee Michael Denis Alicia adam anika belinda david ed linda max "
    "paul rob shelby victor",
    "dev": "m4 Mario steph",
    "test": "m7 f4 boris Alex travis caleb",
    "babble-train": "Hugo Jacky antonio pablo quincy robert edward",
    "babble-test": "Marco marcelo norbert sandro zac john Henrique",
}
SPEAKERS = {"train": range(0, 96), "dev": range(1000, 1008), "test": range(2000, 2016)}
SPEAKERS |= {"babble-train": range(3000, 3025), "babble-test": range(4000, 4025)}


def voice_of(split: str, speaker: int, seed: int) -> Voice:
    """The voice of a speaker, with the small changes of one utterance."""
    who = random.Random(f"speaker {speaker}")
    accent, variant = who.choice(ACCENTS), who.choice(VARIANTS[split].split())
    pitch, spread, rate = who.randint(30, 70), who.randint(30, 70), who.randint(115, 160)
    now = random.Random(f"utterance {seed}")
    return Voice(
        f"{accent}+{variant}", pitch + now.randint(-5, 5), spread, rate + now.randint(-10, 10), now.choice([0, 0, 0, 2])
    )


def at_16k(spoken: Spoken) -> Tensor:
    samples: Tensor = AF.resample(torch.from_numpy(spoken.samples), spoken.rate, RATE)
    return samples / samples.abs().max().clamp_min(1e-3) * 0.5


def utter(row: dict[str, str], speaker: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Sound, and the row that the pictures follow from."""
    spoken = speak(row["spoken"], voice_of(row["split"], speaker, seed))
    phonemes = [(round(start / spoken.rate, 4), name) for start, name in spoken.phonemes]
    kept = {"text": row["text"], "kind": row["kind"], "speaker": speaker, "seed": seed, "phonemes": phonemes}
    return at_16k(spoken), kept


def pictures(row: dict[str, Any], samples: int, size: int = 96) -> Tensor:
    """`(frames, size, size)` uint8 pictures of an utterance of so many samples at 16 kHz."""
    face = face_of(row["speaker"])
    return draw(mouth_track(row["phonemes"], samples / RATE, face.lead), face, row["seed"], size)


def babble(split: str, phrases: list[str], seconds: float) -> Tensor:
    """25 speakers at once, each saying phrase after phrase."""
    total = torch.zeros(int(seconds * RATE))
    for speaker in SPEAKERS[split]:
        rng, at = random.Random(speaker), 0
        while at < len(total):
            sound = at_16k(speak(rng.choice(phrases), voice_of(split, speaker, rng.getrandbits(30))))
            sound = sound[: len(total) - at]
            total[at : at + len(sound)] += sound
            at += len(sound)
    return total / total.abs().max() * 0.9


def write_video(path: Path, frames: Tensor) -> None:
    """Lossless grey video of 25 frames a second."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "gray"
        for picture in frames.numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray")))
        out.mux(stream.encode(None))


def write_shard(target: Path, rows: list[dict[str, str]], first: int) -> None:
    """Training utterances `first` and on, in one file."""
    sounds, kept = [], []
    for number, row in enumerate(rows, first):
        speaker = random.Random(number).choice(SPEAKERS["train"])
        sound, done = utter(row, speaker, number)
        sounds.append((sound * 32767).to(torch.int16).numpy())
        kept.append(done)
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        offset = np.cumsum([0, *map(len, sounds)])
        np.savez(file, audio=np.concatenate(sounds), offset=offset, rows=np.array(json.dumps(kept)))
    os.replace(partial, target)


def homophenes(rows: list[dict[str, str]]) -> dict[str, Any]:
    """The share of words that lips alone must get wrong, read word by word without context, in all and by kind.

    Of a grid sentence a reader knows in which of the six slots a word stands. Free sentences are not counted.
    """
    looks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        for slot, word in enumerate(row["spoken"].split() if row["kind"] != "free" else []):
            if word not in shapes:
                shapes[word] = viseme_string(name for _, name in speak(word, Voice("en-us")).phonemes)
            known = (slot,) if row["kind"] == "grid" else ()
            looks.setdefault(row["kind"], []).append((word, (*known, *shapes[word])))
    kinds = {kind: {"homophene_bound": homophene_bound(own), "words": len(own)} for kind, own in looks.items()}
    words = sum(len(own) for own in looks.values())
    wrong = sum(kind["homophene_bound"] * kind["words"] for kind in kinds.values())
    return {"homophene_bound": wrong / max(1, words), "words": words, "kinds": kinds}


def write_clips(folder: Path, rows: list[dict[str, str]], split: str) -> None:
    """Clips as FLAC and video files, with a manifest for each kind of phrase."""
    manifests: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        speaker, seed = list(SPEAKERS[split])[number % len(SPEAKERS[split])], 10**6 * (1 + (split == "test")) + number
        sound, done = utter(row, speaker, seed)
        name = f"{row['kind']}-{number:04d}"
        (folder / row["kind"]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / row["kind"] / f"{name}.flac", sound.numpy(), RATE)
        write_video(folder / row["kind"] / f"{name}.mkv", pictures(done, len(sound)))
        files = {"audio_filepath": f"{name}.flac", "video_filepath": f"{name}.mkv"}
        entry = {**files, "text": row["text"], "duration": round(len(sound) / RATE, 3), "speaker": speaker}
        manifests.setdefault(row["kind"], []).append(json.dumps(entry) + "\n")
    for kind, lines in manifests.items():
        (folder / kind / "manifest.jsonl").write_text("".join(lines))
    bound = homophenes(rows)
    (folder / "homophenes.json").write_text(json.dumps(bound))
    shares = ", ".join(f"{100 * own['homophene_bound']:.1f} % of {kind}" for kind, own in bound["kinds"].items())
    print(f"{split}: {len(rows)} clips; words that lips alone, without context, must get wrong: {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phrases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard", type=int, default=500, help="utterances in a training shard")
    everything = ("babble", "dev", "test", "train")
    parser.add_argument("--parts", nargs="+", choices=everything, default=everything, help="what to make")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in arguments.phrases.read_text().splitlines()]
    of = {split: [row for row in rows if row["split"] == split] for split in ("train", "dev", "test")}
    out = arguments.out
    (out / "train").mkdir(parents=True, exist_ok=True)
    (out / "babble").mkdir(exist_ok=True)
    for split in ("train", "test"):
        target = out / "babble" / f"{split}.flac"
        if "babble" in arguments.parts and not target.exists():
            # The crowd of the test says what is in no training, the other what is in no test.
            spoken = [row["spoken"] for row in of[split]]
            soundfile.write(target, babble(f"babble-{split}", spoken, 60.0).numpy(), RATE)
    for split in ("dev", "test"):
        if split in arguments.parts and of[split] and not (out / split / "homophenes.json").exists():
            write_clips(out / split, of[split], split)
    for start in range(0, len(of["train"]) if "train" in arguments.parts else 0, arguments.shard):
        target = out / "train" / f"{start // arguments.shard:04d}.npz"
        if not target.exists():
            began = time.perf_counter()
            write_shard(target, of["train"][start : start + arguments.shard], start)
            print(f"{target.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
