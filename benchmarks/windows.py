"""Sentences joined to long recordings, transcribed through the batch job, against the same sentences one by one.

    python benchmarks/windows.py MANIFEST MODEL [--split dev] [--sentences 24] [--trim] [--rows 10:0.3] [--no-vad]

MANIFEST is JSON lines with `audio_filepath`, `text` and perhaps `split`. Each row of the table is one recording of all
sentences with silence of 0 to 3 s between them, alone or in noise of 20 to 0 dB (white, at one level or rising to it).
A single sentence is a piece of that recording, so the noise in it is the same. `single` and `joined` are word error
rates in percent; the goal is a difference of at most one point. `windows` is how many the model saw, `speech` the share
of the recording in those with text.

With `--trim` the silence around each sentence is cut off first: many recordings of sentences bring a pause of their
own, and a gap of 0 s is then none.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
from numpy.typing import NDArray

from tokenthrift.evaluation.wer import word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.transcription import Transcriber, load_recognizer, sound
from tokenthrift.transcription.recordings import Recording

RATE = 16_000
LEVEL = 0.05
Samples = NDArray[np.float32]


def with_noise(samples: Samples, decibels: float | None, rising: bool) -> Samples:
    """White noise so far below speech of the level `LEVEL`, from the start or at the end."""
    if decibels is None:
        return samples
    noise = np.random.default_rng(0).normal(size=len(samples)) * LEVEL * 10 ** (-decibels / 20)
    return np.asarray(samples + noise * (np.linspace(0.03, 1, len(samples)) if rising else 1), dtype=np.float32)


def trimmed(samples: Samples) -> Samples:
    """A sentence with 50 ms before and behind what is speech in it."""
    (plan,) = sound.plan_sound(Recording(Path("sentence"), samples=samples, rate=RATE), RATE, 30.0, None, "mix")
    frames = np.flatnonzero(plan.speech)
    size = RATE // 50
    return samples[max(0, frames[0] * size - 800) : (frames[-1] + 1) * size + 800] if len(frames) else samples


def row(text: str) -> tuple[float | None, bool, float]:
    """`10+:0.3` is noise that rises to 10 dB, and gaps of 0.3 s; `none:0` neither noise nor gaps."""
    noise, _, gap = text.partition(":")
    return None if noise == "none" else float(noise.removesuffix("+")), noise.endswith("+"), float(gap)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("model")
    parser.add_argument("--split")
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--others", action="store_true", help="the sentences not drawn, in the order of their speakers")
    parser.add_argument("--trim", action="store_true", help="without the silence around each sentence")
    parser.add_argument("--rows", nargs="+", type=row, help="NOISE:GAP of each row, NOISE none, 10 or (rising) 10+")
    parser.add_argument("--no-vad", action="store_true", help="windows by energy, as without silero-vad")
    arguments = parser.parse_args()
    if arguments.no_vad:
        sound.load_vad = lambda: None  # type: ignore[attr-defined, assignment]
    rows = [json.loads(line) for line in arguments.manifest.read_text().splitlines()]
    rows = [each for each in rows if arguments.split in (None, each.get("split"))]
    drawn = random.Random(arguments.seed).sample(rows, min(arguments.sentences, len(rows)))
    if arguments.others:
        rows = sorted((each for each in rows if each not in drawn), key=lambda each: str(each.get("speaker")))
    else:
        rows = drawn
    clips = [read_audio(arguments.manifest.parent / each["audio_filepath"]).numpy() for each in rows]
    clips = [clip * (LEVEL / max(float(np.sqrt(np.square(clip).mean())), 1e-6)) for clip in clips]
    clips = [trimmed(clip) for clip in clips] if arguments.trim else clips
    texts = [each["text"] for each in rows]
    transcriber = Transcriber(load_recognizer(arguments.model))
    noises = [(None, False), *((level, rising) for level in (20.0, 10.0, 0.0) for rising in (False, True))]
    table = arguments.rows or [
        (level, rising, gap)
        for level, rising in noises
        for gap in ([0.0, 0.3, 1.0, 3.0] if level is None else [0.3, 3.0])
    ]
    print(f"{len(rows)} sentences, {sum(map(len, clips)) / RATE:.0f} s")
    print(f"{'noise':>14} {'gap s':>6} {'single':>7} {'joined':>7} {'points':>7} {'windows':>8} {'speech':>7}")
    clean: list[str] = []  # texts of single sentences without noise, which no gap changes
    with TemporaryDirectory() as folder:
        for level, rising, gap in table:
            silence = np.zeros(round(gap * RATE), np.float32)
            whole = with_noise(np.concatenate([part for clip in clips for part in (clip, silence)]), level, rising)
            soundfile.write(path := Path(folder, "joined.wav"), whole, RATE, subtype="FLOAT")
            starts = np.cumsum([0, *(len(clip) + len(silence) for clip in clips)])
            singles = [Path(folder, f"{index}.wav") for index in range(len(clips))]
            for clip, start, single_path in zip(clips, starts, singles, strict=False):
                soundfile.write(single_path, whole[start : start + len(clip)], RATE, subtype="FLOAT")
            known = clean if level is None else []
            result, *others = transcriber.transcribe(path, *([] if known else singles))
            alone = known or [each.text for each in others]
            clean = alone if level is None else clean
            single = 100 * word_errors(texts, alone).rate
            joined = 100 * word_errors([" ".join(texts)], [result.text]).rate
            name = "none" if level is None else f"{level:.0f} dB" + (" rising" if rising else "")
            held = sum(segment.end - segment.start for segment in result.segments) / max(result.seconds, 1e-9)
            print(
                f"{name:>14} {gap:6.1f} {single:7.2f} {joined:7.2f} {joined - single:+7.2f}"
                f" {result.windows:8} {held:7.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
