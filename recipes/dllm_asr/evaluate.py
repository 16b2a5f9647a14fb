"""Word error rates of a model's readings by source: `python evaluate.py MODEL SET ...`.

Draft, the decoder's left-to-right reading, and the transcript, for each set (a folder with a `manifest.jsonl`, as
`recordings.py` writes) and each of its sources; Whisper's normalizer, errors over whole sets. Costs are the benchmark's
business (`benchmarks/dllm_asr.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of, greedy
from tokenthrift.evaluation.wer import ErrorCount, word_errors
from tokenthrift.media.audio import read_audio

BATCH = 8


def read_set(folder: Path) -> list[dict[str, Any]]:
    """Rows of a manifest with their audio; the longest first."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [row | {"audio": read_audio(folder / row["audio_filepath"])} for row in rows if "<" not in row["text"]]
    return sorted(found, key=lambda row: len(row["audio"]), reverse=True)


@torch.inference_mode()
def readings(model: DllmAsr, rows: list[dict[str, Any]], baseline: AutoregressiveDecoder | None = None) -> list[str]:
    """Writes `draft`, `left to right` (and `baseline`) and `denoised` into the rows; the names of those readings.

    A left-to-right text is cut at twice the tokens of the draft and eight more: it must not loop.
    """
    decoders = {"left to right": decoder_of(model)} | ({"baseline": baseline.decoder} if baseline else {})
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        states, lengths = model.encode([row["audio"] for row in batch])
        drafts = model.drafts(states, lengths)
        memory = model.adapter(states, lengths)
        done = model.decode(states, lengths)
        for row, words, transcript in zip(batch, drafts, done, strict=True):
            row["draft"] = " ".join(word.text for word in words)
            row["denoised"], row["rounds"] = transcript.text, transcript.usage.rounds
        for name, decoder in decoders.items():
            for row, words, ids in zip(batch, drafts, greedy(decoder, *memory, model.vocabulary), strict=True):
                most = 8 + 2 * sum(len(model.vocabulary.word(word.text)) for word in words)
                row[name] = model.vocabulary.text(ids[:most])
    return ["draft", *decoders, "denoised"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("sets", type=Path, nargs="+", help="folders with a manifest.jsonl")
    parser.add_argument("--baseline", type=Path, help="folder of a decoder trained left to right on the same states")
    parser.add_argument("--every", type=int, default=1, help="use only every n-th recording")
    parser.add_argument("--json", type=Path, help="write every text here")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = DllmAsr.from_pretrained(arguments.model)
    baseline = AutoregressiveDecoder.from_pretrained(arguments.baseline) if arguments.baseline else None
    written: list[dict[str, Any]] = []
    for folder in arguments.sets:
        rows = read_set(folder)[:: arguments.every]
        names = readings(model, rows, baseline)
        sources = sorted({row["source"] for row in rows if "source" in row})
        for source in (None, *sources):
            some = [row for row in rows if source is None or row.get("source") == source]
            found: dict[str, ErrorCount] = {
                name: word_errors([row["text"] for row in some], [row[name] for row in some]) for name in names
            }
            shown = [f"{name} {100 * count.rate:.1f} %" for name, count in found.items()]
            rounds = sum(row["rounds"] for row in some) / len(some)
            label = folder.name if source is None else f"  {source}"
            print(f"{label}: {len(some)} clips |", ", ".join(shown), f"| {rounds:.2f} rounds", flush=True)
        written += [{"set": folder.name} | {k: v for k, v in row.items() if k != "audio"} for row in rows]
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main()
