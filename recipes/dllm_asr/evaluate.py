"""Word error rates of a model's readings by source: `python evaluate.py MODEL SET ...`.

Draft, the decoder's left-to-right reading, and the transcript, for each set (a folder with a `manifest.jsonl`, as
`recordings.py` writes) and each of its sources; Whisper's normalizer, errors over whole sets. `--budget` reads each
recording at the rate that a token budget affords, several of them one after another. `--certify` verifies drafts too:
the text must be the left-to-right one, in fewer passes. Costs are the benchmark's business (`benchmarks/dllm_asr.py`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tokenthrift.budget import ItemSize, TokenBudget
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of, greedy
from tokenthrift.dllm_asr.draft import length_guard
from tokenthrift.dllm_asr.rates import choose_rate
from tokenthrift.evaluation.wer import ErrorCount, word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.recognizers.precision import with_precision

BATCH = 8


def read_set(folder: Path) -> list[dict[str, Any]]:
    """Rows of a manifest with their audio; the longest first."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"audio": read_audio(folder / row["audio_filepath"])} for row in rows if "<" not in row["text"]]
    return sorted(rows, key=lambda row: len(row["audio"]), reverse=True)


@torch.inference_mode()
def readings(
    model: DllmAsr,
    rows: list[dict[str, Any]],
    baseline: AutoregressiveDecoder | None = None,
    budget: TokenBudget | None = None,
    certify: Literal["ctc", "denoised", "both"] | None = None,
    size: int = BATCH,
) -> list[str]:
    """Writes `draft`, `left to right` (and `baseline`), `denoised` (and `certified`) into the rows; their names.

    A left-to-right text ends at the length guard of the draft: it must not loop.
    """
    decoders = {"left to right": decoder_of(model)} | ({"baseline": baseline.decoder} if baseline else {})
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        states, lengths = model.encode([row["audio"] for row in batch])
        sizes = [ItemSize(seconds=len(row["audio"]) / model.sample_rate) for row in batch]
        rates = [choose_rate(size, budget or TokenBudget(), model.config.adapter)[0] for size in sizes]
        drafts = model.drafts(states, lengths)
        memory, memory_mask = model.adapter(states, lengths, rates)
        # A model may certify by itself; the denoised text is that without.
        done = model.decode(states, lengths, settings=replace(model.config.decode, certify=None), rates=rates)
        for row, words, transcript in zip(batch, drafts, done, strict=True):
            row["draft"] = " ".join(word.text for word in words)
            row["denoised"], row["rounds"] = transcript.text, transcript.usage.rounds
            row["tokens"] = transcript.usage.used
        limits = [length_guard(words, model.vocabulary) for words in drafts]
        for name, decoder in decoders.items():
            texts = greedy(decoder, memory, memory_mask, model.vocabulary, limits)
            for row, ids, limit in zip(batch, texts, limits, strict=True):
                row[name], row[f"{name} passes"] = model.vocabulary.text(ids), min(limit, len(ids) + 1)
        if certify is not None:
            way = replace(model.config.decode, certify="ar", certify_draft=certify)
            for row, transcript in zip(batch, model.decode(states, lengths, settings=way, rates=rates), strict=True):
                usage = transcript.usage
                row["certified"], row["certified passes"] = transcript.text, usage.rounds
                row["accepted"], row["written"] = usage.accepted, usage.written
    return ["draft", *decoders, "denoised", *(["certified"] if certify else [])]


def report(label: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Prints a line of error rates, rounds and tokens."""
    found: dict[str, ErrorCount] = {
        name: word_errors([row["text"] for row in rows], [row[name] for row in rows]) for name in names
    }
    shown = ", ".join(f"{name} {100 * count.rate:.1f} %" for name, count in found.items())
    rounds = sum(row["rounds"] for row in rows) / len(rows)
    rate = sum(row["tokens"] for row in rows) / sum(len(row["audio"]) / 16_000 for row in rows)
    print(f"{label}: {len(rows)} clips | {shown} | {rounds:.2f} rounds | {rate:.1f} tokens a second", flush=True)
    if "certified" in names:
        same = sum(row["certified"] == row["left to right"] for row in rows)
        kept = sum(row["accepted"] for row in rows) / sum(row["written"] for row in rows)
        passes = [sum(row[f"{name} passes"] for row in rows) / len(rows) for name in ("certified", "left to right")]
        print(
            f"    certified: {same} of {len(rows)} texts are the left-to-right ones, {100 * kept:.1f} % of tokens "
            f"accepted, {passes[0]:.2f} passes a clip instead of {passes[1]:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("sets", type=Path, nargs="+", help="folders with a manifest.jsonl")
    parser.add_argument("--baseline", type=Path, help="folder of a decoder trained left to right on the same states")
    parser.add_argument("--every", type=int, default=1, help="use only every n-th recording")
    parser.add_argument("--budget", nargs="+", default=["{}"], help="token budgets, as 25/s 12.5/s 64 (default: none)")
    parser.add_argument("--pools", type=int, nargs="+", help="trained poolings, where the model's config names none")
    parser.add_argument("--certify", choices=["ctc", "denoised", "both"], help="verify these drafts")
    parser.add_argument("--precision", choices=["float32", "int8"], help="of linear layers (default: float32)")
    parser.add_argument("--json", type=Path, help="write every text here")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = DllmAsr.from_pretrained(arguments.model)
    with_precision(model, model, arguments.precision)
    if arguments.pools:
        pools = replace(model.config.adapter, pools=tuple(sorted(arguments.pools)))
        model.config = replace(model.config, adapter=pools)
    baseline = AutoregressiveDecoder.from_pretrained(arguments.baseline) if arguments.baseline else None
    size = 1 if arguments.precision == "int8" else BATCH  # in 8 bits a recording is read alone, see `OneByOne`
    if baseline is not None:
        with_precision(baseline, baseline, arguments.precision)
    written: list[dict[str, Any]] = []
    for folder in arguments.sets:
        rows = read_set(folder)[:: arguments.every]
        sources = sorted({row["source"] for row in rows if "source" in row})
        for budget in arguments.budget:
            names = readings(model, rows, baseline, TokenBudget.parse(budget), arguments.certify, size)
            report(folder.name if budget == "{}" else f"{folder.name} at {budget}", rows, names)
            for source in sources if budget == arguments.budget[0] else ():
                report(f"  {source}", [row for row in rows if row.get("source") == source], names)
            written += [
                {"set": folder.name, "budget": budget} | {k: v for k, v in row.items() if k != "audio"} for row in rows
            ]
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main()
