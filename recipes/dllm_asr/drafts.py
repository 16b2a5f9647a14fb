"""What the CTC head writes of the training data: `python drafts.py FEATURES --draft LAST.ckpt`.

The denoiser learns to correct real drafts, so they are made once the draft head is trained: each shard gets a
`.drafts.json` beside it, for every utterance a list of [word, confidence, start, end]. `--again` replaces those of an
earlier checkpoint. A model folder gives its draft head as a checkpoint does.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import astuple
from pathlib import Path

import torch

from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.draft import DraftHead, draft_words
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.training.batch import collate
from tokenthrift.dllm_asr.training.data import CachedStates
from tokenthrift.dllm_asr.training.weights import DRAFT, trained_weights
from tokenthrift.hub import read_config
from tokenthrift.training.precision import cpu_has_bf16


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--draft", required=True, help="model folder, or training checkpoint with a trained CTC head")
    parser.add_argument("--again", action="store_true", help="make drafts also where there are some")
    arguments = parser.parse_args()
    weights = trained_weights(arguments.draft).tensors
    head = {name.removeprefix(DRAFT): tensor for name, tensor in weights.items() if name.startswith(DRAFT)}
    if not head:
        parser.error(f"--draft: the CTC head was not trained in {arguments.draft}")
    # Training makes heads of the default size; a model folder says which size its head has.
    folder = Path(arguments.draft)
    sizes = read_config(folder, DllmAsr).draft if folder.is_dir() else DraftConfig()
    draft = DraftHead(sizes, head["conv.weight"].shape[1]).eval()
    draft.load_state_dict(head)
    for shard in sorted(arguments.features.glob("*.safetensors")):
        target = shard.with_suffix(".drafts.json")
        if (target.exists() and not arguments.again) or shard.name.startswith("dev-"):
            continue
        data = CachedStates([shard])
        rows: list[list[tuple[object, ...]]] = [[] for _ in range(len(data))]
        order = sorted(range(len(data)), key=lambda i: data.lengths[i])
        for group in (order[i : i + 16] for i in range(0, len(order), 16)):
            batch = collate([data[0, i] for i in group])
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                log_p = draft(batch.states, batch.lengths)
            for i, row, n in zip(group, log_p, batch.lengths.tolist(), strict=True):
                rows[i] = [astuple(word) for word in draft_words(row[:n])]
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(rows))
        os.replace(partial, target)
        print(f"{target.name}: {sum(map(len, rows))} words in {len(rows)} utterances", flush=True)


if __name__ == "__main__":
    main()
