"""A small Llama reads KARL's tokens and writes the class of the photo as a word: accuracy against tokens.

Photos are those of `pack.py`, their labels are in the same CIFAR-10 file. KARL stays frozen and encodes every photo
once; since its tokens are nested, training draws a length for each photo of each batch and cuts there, so that one
language model serves all budgets. Words are spelled in letters; a photo counts as right where the whole word is.

    python recipes/karl/class_words.py --model model_cards/karl-tiny-64 --cifar cifar10_train.npz --data data/karl \
        --out runs/karl/class_words
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pack import PHOTOS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tokenthrift.backbones.causal import CausalBackbone
from tokenthrift.budget import TokenUsage
from tokenthrift.evaluation.report import Table, new_figure, write_report
from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.karl.evaluation.sweeps import prepare
from tokenthrift.karl.halting import kept
from tokenthrift.karl.model import Karl
from tokenthrift.karl.tokens_to_llm import TokenProjector
from tokenthrift.tokens import TokenBatch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = len(LETTERS)


def spelled(words: list[str]) -> tuple[Tensor, Tensor]:
    """Ids `(words, longest + 1)` with the end after each word, and where they are."""
    rows = [[LETTERS.index(letter) for letter in word] + [END] for word in words]
    width = max(map(len, rows))
    ids = torch.tensor([row + [END] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


@torch.inference_mode()
def tokens_of(karl: Karl, images: Tensor, error: float) -> tuple[TokenBatch, list[int]]:
    """All tokens of all images, and how many of them one pass keeps at a target error."""
    values, codes, counts = [], [], []
    for items in prepare(karl, images, 128):
        size, most = len(items.images), karl.config.max_tokens
        full = torch.full((size,), most)
        found = karl.encode_latents(items.images, items.features, full, torch.full((size,), ERROR_BINS[0]))
        quantized = karl.quantize(found.tokens, found.mask)
        values.append(quantized.values)
        codes.append(torch.full((size, most), -1) if quantized.codes is None else quantized.codes)
        adaptive = karl.encode_latents(items.images, items.features, full, torch.full((size,), error))
        keep = kept(adaptive.halting_logits, adaptive.mask, threshold=karl.config.halting_threshold, prefix=True)
        counts += keep.sum(1).tolist()
    embeddings = torch.cat(values).clone()
    most = embeddings.shape[1]
    batch = TokenBatch(
        embeddings=embeddings,
        mask=torch.ones(len(embeddings), most, dtype=torch.bool),
        positions=torch.arange(most).expand(len(embeddings), -1),
        codes=None if karl.config.codebook_size is None else torch.cat(codes).clone(),
        usage=(TokenUsage(native=most, cap=most, used=most),) * len(embeddings),
    )
    return batch, counts


def picked(tokens: TokenBatch, rows: Tensor, counts: list[int]) -> TokenBatch:
    """The first tokens of some of the images."""
    return tokens.select(rows.tolist()).first(counts)


class Reader(nn.Module):
    """The projector and the language model.

    Args:
        karl: whose tokens are read.
        source: "codes" or "values".
        hidden_size: of the language model.
        layers: of the language model.
    """

    def __init__(self, karl: Karl, source: Any, hidden_size: int, layers: int) -> None:
        super().__init__()
        config = AutoConfig.for_model(
            "llama",
            vocab_size=END + 1,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 32,
            max_position_embeddings=karl.config.max_tokens + 16,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.backbone = CausalBackbone(AutoModelForCausalLM.from_config(config))
        self.projector = TokenProjector(karl.config, hidden_size, source)

    def loss(self, tokens: TokenBatch, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy of the letters."""
        prefix = self.projector(tokens)
        logits = self.backbone(prefix.embeddings, prefix.mask, ids, mask)
        return F.cross_entropy(logits[mask], ids[mask])

    @torch.inference_mode()
    def write(self, tokens: TokenBatch, longest: int) -> list[str]:
        """The words."""
        prefix = self.projector(tokens)
        rows = self.backbone.generate(prefix.embeddings, prefix.mask, max_new_tokens=longest, end=END)
        return ["".join(LETTERS[letter] for letter in row.ids) for row in rows]


def batches(size: int, batch: int, steps: int, random: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of `steps` batches, every row once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(size, generator=random)])
        yield order[:batch]
        order = order[batch:]


def accuracy(reader: Reader, tokens: TokenBatch, counts: list[int], words: list[str], truth: list[int]) -> float:
    """Share of images whose word is right, with these counts."""
    right = 0
    for start in range(0, len(truth), 250):
        rows = torch.arange(start, min(start + 250, len(truth)))
        said = reader.write(picked(tokens, rows, [counts[row] for row in rows]), max(map(len, words)) + 1)
        right += sum(word == words[truth[row]] for word, row in zip(said, rows.tolist(), strict=True))
    return right / len(truth)


def main() -> None:
    """Encodes, trains, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="KARL model with nested tokens")
    parser.add_argument("--cifar", type=Path, required=True, help="npz with `label` and `names`")
    parser.add_argument("--data", type=Path, required=True, help="folder that pack.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes")
    parser.add_argument("--source", choices=["codes", "values"], default="values", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="training photos (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the Llama (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the Llama (default: %(default)s)")
    parser.add_argument(
        "--error", type=float, default=0.05, help="target error of the adaptive row (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    random = torch.Generator().manual_seed(options.seed)
    karl = Karl.from_pretrained(options.model)
    if not karl.support.nested:
        raise SystemExit("cutting tokens needs a model whose tokens are nested")
    data = np.load(options.cifar)
    words = [str(name) for name in data["names"]]
    classes = data["label"].tolist()
    sets: dict[str, tuple[TokenBatch, list[int], list[int]]] = {}
    for part, limit in (("train", options.images), ("test", 2000)):
        images = torch.from_numpy(np.load(options.data / f"photos_{part}.npy")[:limit])
        labels = [classes[index] for index in PHOTOS[part]][: len(images)]
        sets[part] = (*tokens_of(karl, images, options.error), labels)
        print(f"{part}: {len(images)} photos encoded", flush=True)

    reader = Reader(karl, options.source, options.hidden_size, options.layers)
    optimizer = torch.optim.AdamW(reader.parameters(), 1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=options.steps, pct_start=0.1)
    tokens, _, labels = sets["train"]
    ids, mask = spelled(words)
    native, started = karl.config.max_tokens, time.perf_counter()
    for step, rows in enumerate(batches(len(labels), options.batch, options.steps, random), 1):
        # Short prefixes often: an octave of lengths is as likely as any other.
        lengths = 2 ** (torch.rand(len(rows), generator=random) * np.log2(native))
        truth = torch.tensor([labels[row] for row in rows.tolist()])
        loss = reader.loss(picked(tokens, rows, lengths.ceil().int().tolist()), ids[truth], mask[truth])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    reader.eval()
    tokens, adaptive, labels = sets["test"]
    counts = [2**power for power in range(native.bit_length()) if 2**power <= native]
    found = [(n, accuracy(reader, tokens, [n] * len(labels), words, labels)) for n in counts]
    mean = sum(adaptive) / len(adaptive)
    by_content = accuracy(reader, tokens, adaptive, words, labels)
    rows_out = [(f"first {n}", float(n), share) for n, share in found]
    rows_out.append((f"as one pass keeps at e{options.error:g}", mean, by_content))
    figure, axes = new_figure()
    axes.plot(counts, [share for _, share in found], "o-", label="first tokens")
    axes.plot([mean], [by_content], "*", markersize=12, label=f"adaptive, e{options.error:g}")
    axes.axhline(1 / len(words), color="0.6", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="tokens a photo (mean)", ylabel="accuracy", title="Class words through a small Llama")
    axes.legend()
    parameters = sum(parameter.numel() for parameter in reader.parameters())
    write_report(
        options.out,
        title="Class words of photos from KARL's tokens",
        settings={name: str(value) for name, value in vars(options).items()} | {"parameters of the reader": parameters},
        tables=[
            Table(
                title="Accuracy against tokens",
                columns=("tokens", "mean", "accuracy"),
                rows=tuple(rows_out),
                note=f"{len(labels)} photos kept out of all training, {len(words)} words; one reader for all counts.",
            )
        ],
        figures={"accuracy_against_tokens": figure},
    )
    print((options.out / "report.md").read_text())


if __name__ == "__main__":
    main()
