"""Training checkpoints to a model folder: `python export.py OUT LAST.ckpt [MORE.ckpt ...] [--autoregressive]`.

A checkpoint gives the parts it trained (draft head, or adapter and language model), so parts that were trained apart
are put together here. The folder gets fp16 safetensors, `config.json` and `tokenizer.json`. Checkpoints are read with
`weights_only=True`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of
from tokenthrift.dllm_asr.module import DllmAsrModule


def merge(checkpoints: list[Path]) -> DllmAsrModule:
    """A module with the trained parts of all checkpoints; one that trained the denoiser names the sizes."""
    found = [torch.load(p, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"] for p in checkpoints]
    options = next((o for o in found if o["train_denoiser"]), found[0])
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    return DllmAsrModule(**{**options, "start_from": [str(p) for p in checkpoints]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--autoregressive", action="store_true", help="the checkpoint is of AutoregressiveModule")
    arguments = parser.parse_args()
    module = merge(arguments.checkpoints)
    if arguments.autoregressive:
        rival = AutoregressiveDecoder(module.model.config, module.model.vocabulary)
        rival.decoder.load_state_dict(decoder_of(module.model).state_dict())
        rival.save_pretrained(arguments.out, dtype=torch.float16)
    else:
        module.model.save_pretrained(arguments.out, dtype=torch.float16)
    print(f"{arguments.out}: {sum(f.stat().st_size for f in arguments.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
