"""When each training word is spoken: `python align.py FEATURES --draft LAST.ckpt`.

The CTC head of a checkpoint aligns the cached states with their texts (torchaudio's forced alignment), and each shard gets a `.times.json` beside
it: for every utterance a list of [start, end] in seconds by word, or null where the text does not fit the audio. An early checkpoint
will do. Shards that have their times are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torchaudio.functional as AF

from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.data import CachedStates, collate
from tokenthrift.dllm_asr.draft import SECONDS, DraftHead, character_ids


def word_times(log_p: torch.Tensor, text: str) -> list[tuple[float, float]] | None:
    """Start and end of each word of a text in one recording's `(N, 29)` log-probabilities."""
    targets = character_ids(text)
    repeats = sum(a == b for a, b in zip(targets, targets[1:], strict=False))
    if not targets or len(log_p) < len(targets) + repeats:
        return None
    path, scores = AF.forced_align(log_p[None], torch.tensor([targets], dtype=torch.int32))
    spans = AF.merge_tokens(path[0], scores[0])
    times, position = [], 0
    for word in text.split():
        letters = spans[position : position + len(word)]
        times.append((round(letters[0].start * SECONDS, 2), round(letters[-1].end * SECONDS, 2)))
        position += len(word) + 1
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--draft", type=Path, required=True, help="training checkpoint with a trained CTC head")
    arguments = parser.parse_args()
    weights = torch.load(arguments.draft, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    head = {k.removeprefix("model.draft."): v for k, v in weights.items() if k.startswith("model.draft.")}
    draft = DraftHead(DraftConfig(), head["conv.weight"].shape[1])
    draft.load_state_dict(head)
    for shard in sorted(arguments.features.glob("*.safetensors")):
        target = shard.with_suffix(".times.json")
        if target.exists() or shard.name.startswith("dev-"):
            continue
        data = CachedStates([shard])
        times: list[list[tuple[float, float]] | None] = [None] * len(data)
        order = sorted(range(len(data)), key=lambda i: data.lengths[i])
        for rows in (order[i : i + 16] for i in range(0, len(order), 16)):
            batch = collate([data[i] for i in rows])
            with torch.autocast("cpu", torch.bfloat16):
                log_p = draft(batch.states, batch.lengths)
            for i, row, n in zip(rows, log_p, batch.lengths.tolist(), strict=True):
                times[i] = word_times(row[:n], data[i].text)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(times))
        os.replace(partial, target)
        print(f"{target.name}: {sum(t is not None for t in times)} of {len(times)}", flush=True)


if __name__ == "__main__":
    main()
