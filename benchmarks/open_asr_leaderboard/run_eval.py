"""The open ASR leaderboard's evaluation for any model of this job, with its own options and its own JSONL.

The leaderboard's repository asks each family of models for a `run_eval.py` that takes the options below, times the
transcription after a warm-up, and writes a line `{"audio_filepath", "duration", "time", "text", "pred_text"}` for each
clip, which its normalizer then scores. Data sets come through the package `datasets`:

    pip install datasets
    python benchmarks/open_asr_leaderboard/run_eval.py --model_id openai/whisper-tiny.en \
        --dataset_path hf-audio/esb-datasets-test-only-sorted --dataset librispeech --split test.clean

`--manifest FILE` evaluates a local manifest (`audio_filepath`, `text`) instead. It prints the word error rate with
Whisper's English normalizer and the inverse real-time factor; times are wall seconds of a batch shared out by the
seconds of its clips, as the leaderboard does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenthrift.devices import working_device
from tokenthrift.evaluation.wer import normalize_english, word_errors
from tokenthrift.transcription.job import Transcriber
from tokenthrift.transcription.models import load_recognizer
from tokenthrift.transcription.recordings import Recording, read_manifest


@dataclass
class Clip:
    """A recording, and what was said."""

    name: str
    recording: Recording
    text: str


def main() -> None:
    """Evaluates one model on one split."""
    arguments = _parser().parse_args()
    device = "cpu" if arguments.device < 0 else f"cuda:{arguments.device}"
    transcriber = Transcriber(load_recognizer(arguments.model_id, working_device(device)))
    clips = list(_clips(arguments))
    for clip in clips[: arguments.warmup_steps * arguments.batch_size]:
        transcriber.transcribe(clip.recording)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(clips), arguments.batch_size):
        batch = clips[start : start + arguments.batch_size]
        began = _now(device)
        results = transcriber.transcribe(*(clip.recording for clip in batch))
        spent = _now(device) - began
        seconds = sum(result.seconds for result in results) or 1.0
        rows += [
            {
                "audio_filepath": clip.name,
                "duration": round(result.seconds, 3),
                "time": spent * result.seconds / seconds,
                "text": normalize_english(clip.text),
                "pred_text": normalize_english(result.text),
            }
            for clip, result in zip(batch, results, strict=True)
        ]
    rows = [row for row in rows if row["text"]]
    name = f"MODEL_{arguments.model_id}_DATASET_{arguments.dataset_path}_{arguments.dataset}_{arguments.split}"
    path = Path(arguments.out) / f"{name.replace('/', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    errors = word_errors([row["text"] for row in rows], [row["pred_text"] for row in rows], str)
    factor = sum(row["duration"] for row in rows) / max(1e-9, sum(row["time"] for row in rows))
    print(f"{path}\nWER {100 * errors.rate:.2f} %, RTFx {factor:.2f}, {len(rows)} clips")


def _clips(arguments: argparse.Namespace) -> Iterator[Clip]:
    if arguments.manifest is not None:
        for entry in list(read_manifest(arguments.manifest))[: arguments.max_eval_samples]:
            yield Clip(str(entry.path), entry, entry.reference or "")
        return
    from datasets import load_dataset

    data: Any = load_dataset(arguments.dataset_path, arguments.dataset, split=arguments.split)
    if arguments.max_eval_samples is not None:
        data = data.select(range(min(arguments.max_eval_samples, len(data))))
    for i, row in enumerate(data):
        audio = row["audio"]
        samples = np.asarray(audio["array"], dtype=np.float32)
        recording = Recording(Path(str(row.get("id", i))), samples=samples, rate=int(audio["sampling_rate"]))
        yield Clip(str(row.get("id", i)), recording, str(row.get("text", row.get("norm_text", ""))))


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--dataset_path", default="hf-audio/esb-datasets-test-only-sorted")
    parser.add_argument("--dataset", default="librispeech")
    parser.add_argument("--split", default="test.clean")
    parser.add_argument("--manifest", type=Path, help="evaluate a local manifest instead of a data set")
    parser.add_argument("--device", type=int, default=-1, help="number of the GPU; -1 is the processor")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--warmup_steps", type=int, default=1)
    parser.add_argument("--out", default="results")
    return parser


if __name__ == "__main__":
    main()
