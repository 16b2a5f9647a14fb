"""Speak the sentences with several engines: `python synthesise.py SENTENCES.jsonl OUT [--piper VOICE.onnx]`.

Synthetic speech, made by Flite 2.2 (voices slt, rms, awb, kal16), eSpeak NG 1.51 (accents and voice variants) and,
where its ONNX file is given, a Piper voice; rate and pitch vary from sentence to sentence. Debian packages: `flite`,
`espeak-ng`. The output is a folder of shards `NNNN-VOICE.npz`, each of one voice: `audio` (int16, 16 kHz, all clips end
to end), `offset` (clip boundaries), `rows` (JSON). Shards are written atomically and skipped where present, so a
stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF

RATE = 16_000
# One cycle of shards. Voices repeat by how natural they sound against what they cost; eSpeak varies its accent and
# timbre per shard.
CYCLE = ("slt", "espeak", "rms", "piper", "awb", "espeak", "slt", "rms", "espeak", "piper", "awb", "kal16")
ACCENTS = ("en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029")
VARIANTS = ("", "+f1", "+f2", "+f3", "+f4", "+f5", "+m1", "+m2", "+m3", "+m4", "+m6", "+m7")
VARIANTS += ("+linda", "+steph", "+paul", "+edward", "+klatt2", "+Andy")


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    return AF.resample(torch.from_numpy(samples).float(), rate, RATE).numpy() if rate != RATE else samples


def run_tts(command: list[str], text: str) -> np.ndarray:
    """The samples a command writes to the file that replaces OUT, given the text on its standard input."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        filled = [out.name if c == "OUT" else c for c in command]
        subprocess.run(filled, input=text.encode(), check=True, capture_output=True, timeout=60)
        samples, rate = soundfile.read(out.name, dtype="float32")
    return resample(samples, rate)


def flite(voice: str, text: str, rng: random.Random) -> np.ndarray:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as source:
        source.write(text)
        source.flush()
        stretch = f"duration_stretch={rng.uniform(0.85, 1.15):.2f}"
        return run_tts(["flite", "-voice", voice, "--setf", stretch, "-f", source.name, "-o", "OUT"], "")


def espeak(voice: str, text: str, rng: random.Random) -> np.ndarray:
    options = ["-s", str(rng.randint(125, 185)), "-p", str(rng.randint(25, 75))]
    return run_tts(["espeak-ng", "-v", voice, *options, "--stdin", "-w", "OUT"], text)


class Piper:
    """A Piper VITS voice in ONNX Runtime, with eSpeak NG's phonemes."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        config = json.loads(Path(f"{path}.json").read_text())
        self.ids, self.rate = config["phoneme_id_map"], config["audio"]["sample_rate"]

    def __call__(self, text: str, rng: random.Random) -> np.ndarray:
        command = ["espeak-ng", "-q", "--ipa", "-v", "en-us", "--stdin"]
        done = subprocess.run(command, input=text.encode(), check=True, capture_output=True, timeout=60)
        ids = [*self.ids["^"], *self.ids["_"]]
        for phoneme in " ".join(done.stdout.decode().split()) + ".":
            if phoneme in self.ids:
                ids += [*self.ids[phoneme], *self.ids["_"]]
        ids += self.ids["$"]
        scales = np.array([0.667, rng.uniform(0.85, 1.2), 0.8], np.float32)  # noise, length, noise of durations
        feed = {"input": np.array([ids], np.int64), "input_lengths": np.array([len(ids)], np.int64), "scales": scales}
        return resample(self.session.run(None, feed)[0].reshape(-1), self.rate)


def make_shard(job: tuple[int, str, list[dict[str, Any]], Path, Path | None]) -> str:
    """Speak one list of sentences with one voice and write the shard; returns what was done."""
    index, engine, rows, out, piper = job
    torch.set_num_threads(1)
    rng = random.Random(index)
    voice = rng.choice(ACCENTS) + rng.choice(VARIANTS) if engine == "espeak" else engine
    target = out / f"{index:04d}-{voice}.npz"
    if target.exists():
        return f"{target.name}: already there"
    speak = Piper(piper) if engine == "piper" and piper else None
    clips, kept = [], []
    for row in rows:
        try:
            if speak:
                clip = speak(row["spoken"], rng)
            else:
                clip = espeak(voice, row["spoken"], rng) if engine == "espeak" else flite(engine, row["spoken"], rng)
        except (subprocess.SubprocessError, soundfile.LibsndfileError):
            continue
        if 0.2 * RATE < len(clip) < 25 * RATE:
            clips.append((np.clip(clip / max(1e-4, np.abs(clip).max()) * 0.7, -1, 1) * 32767).astype(np.int16))
            kept.append({k: row[k] for k in ("id", "text", "split")})
    partial, offset = target.with_suffix(".partial"), np.cumsum([0, *map(len, clips)])
    with partial.open("wb") as f:
        np.savez(f, audio=np.concatenate(clips), offset=offset, rows=np.array(json.dumps(kept)))
    os.replace(partial, target)
    return f"{target.name}: {len(kept)} clips, {sum(map(len, clips)) / RATE / 60:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("out", type=Path)
    piper_help = "a Piper voice, NAME.onnx with NAME.onnx.json beside it; without it Flite speaks in its place"
    parser.add_argument("--piper", type=Path, help=piper_help)
    parser.add_argument("--limit", type=int, default=48_000, help="sentences to speak")
    parser.add_argument("--shard", type=int, default=300, help="sentences in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with arguments.sentences.open() as lines:
        rows = [json.loads(line) for line in lines][: arguments.limit]
    jobs = []
    for index, start in enumerate(range(0, len(rows), arguments.shard)):
        engine = CYCLE[index % len(CYCLE)]
        engine = "slt" if engine == "piper" and not arguments.piper else engine
        jobs.append((index, engine, rows[start : start + arguments.shard], arguments.out, arguments.piper))
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for line in pool.imap_unordered(make_shard, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
