"""The mean of the weights of training checkpoints, or of model folders: `python average.py OUT A B ...`.

Source: model soups (Wortsman et al., 2022). Checkpoints of one run, or of runs that went on from each other, are near
enough for their mean to err less than any of them, which here costs nothing and overfits the cached states less. What
they trained is averaged; the rest, the encoder above all, is that of A. The result starts a training or becomes a model
folder like any checkpoint; it cannot be resumed. Of model folders, of any system, all weights are averaged, and OUT is
a model folder; the two factors of a low-rank adapter are averaged each by itself, which is not the mean of adapters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenthrift.dllm_asr.training.weights import trained_weights
from tokenthrift.models import load


def average_folders(out: Path, folders: list[Path]) -> None:
    """Writes a model folder in float16 with the mean of the weights of others."""
    models = [load(folder) for folder in folders]
    if any((type(model), model.config) != (type(models[0]), models[0].config) for model in models):
        raise SystemExit("the folders are of different models")
    states = [model.state_dict() for model in models]
    # Counts, such as the batches that a norm has seen, stay those of the first.
    means = {
        n: torch.stack([state[n] for state in states]).mean(0) for n, w in states[0].items() if w.is_floating_point()
    }
    models[0].load_state_dict({**states[0], **means})
    models[0].save_pretrained(out, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    arguments = parser.parse_args()
    if all(path.is_dir() for path in arguments.checkpoints):
        average_folders(arguments.out, arguments.checkpoints)
        return
    read = [torch.load(path, map_location="cpu", weights_only=True) for path in arguments.checkpoints]
    states = [checkpoint["state_dict"] for checkpoint in read]
    if any(state.keys() != states[0].keys() for state in states):
        raise SystemExit("the checkpoints are of different models")
    trained = set.intersection(*(set(trained_weights(path).tensors) for path in arguments.checkpoints))
    mean = {n: torch.stack([state[n].double() for state in states]).mean(0).to(states[0][n].dtype) for n in trained}
    torch.save({**read[0], "state_dict": {**states[0], **mean}, "optimizer_states": []}, arguments.out)


if __name__ == "__main__":
    main()
