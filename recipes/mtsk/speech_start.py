"""Where a model of real speech starts: `python speech_start.py TEXTS.jsonl STATES OUT --language-model LLAMA`.

Some hours of speech are too few to find out at once what a sound token is and how to write a sentence. Here each is
learned apart. First the projectors learn by CTC over the language model's own table, so that sound tokens look like its
pieces with blanks in between; a token of a coarse rate holds several such positions, each turned by a rotation of its
own. Then the language model learns to write texts down from tokens that are made of the text itself: pieces and blanks,
some wrong, missing or doubled. That takes no speech, so any text will do. The result is a Llama-MTSK model whose
training goes on with `speech.yaml`. A stopped run goes on.

Not in Llama-MTSK (arXiv 2503.06362), which starts from random projectors and a pretrained Llama.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from real_lips import rate_at
from torch import Tensor, nn
from torch.optim import AdamW

from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.sequence import PROMPTS, Encoded, Rows, label_rows
from tokenthrift.mtsk.training.assembly import AssemblyConfig, assemble
from tokenthrift.mtsk.training.clips import CachedStates, collate
from tokenthrift.padding import pad_rows

BLANK = 0  # the piece <unk>, which no text has
FINEST = 4  # states of a CTC position
WORST = 0.3  # share of wrong pieces in the worst texts


def rotations(size: int, count: int) -> Tensor:
    """(count, size, size) fixed rotations, the first one none: how positions share one token."""
    generator = torch.Generator().manual_seed(0)
    others = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(count - 1)]
    return torch.stack([torch.eye(size), *others])


def ctc_loss(model: LlamaMtsk, tokens: Tensor, counts: Tensor, texts: Sequence[str], turns: Tensor) -> Tensor:
    """CTC of texts over the positions in sound tokens, with the language model's table.

    Args:
        model: has the table and the tokenizer.
        tokens: (B, n, H).
        counts: (B,) tokens of each item.
        texts: B of them.
        turns: (slots, H, H), one for each position in a token.
    """
    with torch.autocast("cpu", enabled=False):
        positions = torch.einsum("bnh,sgh->bnsg", tokens.float(), turns).flatten(1, 2)
        scores = (positions @ model.weight.float().T).log_softmax(-1).transpose(0, 1)
    ids = [torch.tensor(model.token_ids(text)) for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    return F.ctc_loss(scores, torch.cat(ids), counts * len(turns), lengths, blank=BLANK, zero_infinity=True)


class Noise:
    """CTC positions as a recognizer might give them: pieces of one or two positions, blanks, mistakes."""

    def __init__(self, pieces: Sequence[str]) -> None:
        alike: dict[str, list[int]] = defaultdict(list)
        for number, piece in enumerate(pieces):
            alike[piece.strip("▁")[:1]].append(number)
        self.alike = [alike[piece.strip("▁")[:1]] for piece in pieces]

    def path(self, ids: Sequence[int], rng: random.Random) -> list[int]:
        """Positions of a text; nothing but blanks and pieces that start alike are wrong."""
        share = rng.uniform(0, WORST)
        out: list[int] = [BLANK] * rng.randrange(4)
        for piece in ids:
            written = [piece]
            if rng.random() < share:
                wrong = rng.choice(self.alike[piece])
                written = rng.choice([[], [wrong], [wrong], [wrong], [piece, wrong]])
            for one in written:
                if out and out[-1] == one:
                    out.append(BLANK)
                out += [one] * rng.choice([1, 1, 2]) + [BLANK] * rng.choice([0, 0, 1, 1, 2, 3])
        return out or [BLANK]


def made_tokens(model: LlamaMtsk, path: Sequence[int], turns: Tensor) -> Tensor:
    """(n, H) tokens that hold the positions of a path, each in a rotation of `turns`, as long as a projector's."""
    pieces = model.embed([*path, *[BLANK] * (-len(path) % len(turns))]).unflatten(0, (-1, len(turns)))
    together = torch.einsum("nsh,shg->ng", pieces, turns)
    return F.normalize(together, dim=-1) * together.shape[-1] ** 0.5


def reading_loss(model: LlamaMtsk, texts: Sequence[str], rate: int, turns: Tensor, noise: Noise, seed: str) -> Tensor:
    """Cross entropy of texts behind tokens made of them."""
    rng, bos = random.Random(seed), model.config.bos_id
    assert model.markers is not None
    start = model.embed([] if bos is None else [bos])
    prompt = model.embed(model.token_ids(PROMPTS[True, False]))
    prefixes, ended = [], []
    for text in texts:
        ids = model.token_ids(text)
        tokens = made_tokens(model, noise.path(ids, rng), turns[: rate // FINEST])
        prefixes.append(torch.cat([start, model.markers[:1], tokens, model.markers[1:2], prompt]))
        ended.append(torch.tensor([*ids, model.config.eos_id]))
    rows, mask = pad_rows([torch.cat([p, model.embed(ids)]) for p, ids in zip(prefixes, ended, strict=True)])
    labels = label_rows([len(p) for p in prefixes], ended, bos)
    targets = labels[:, 1:][labels[:, 1:] >= 0]
    return F.cross_entropy(model.logits(Rows(rows, mask, labels), Rates(audio=rate)).float(), targets)


def learn(
    model: LlamaMtsk,
    weights: Sequence[nn.Parameter],
    loss: Callable[[int], Tensor],
    path: Path,
    steps: int,
    rate: float,
) -> None:
    """AdamW on the losses of steps 0 to `steps`, in bf16; `path` keeps the whole model and where the run is."""
    optimizer = AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, mean = time.process_time(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        mean = value.item() if step == first else 0.95 * mean + 0.05 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
            seconds = (time.process_time() - began) / (step + 1 - first)
            print(f"{path.stem}, step {step + 1} of {steps}: loss {mean:.3f}, {seconds:.2f} s a step", flush=True)


def speech_batch(states: CachedStates, order: Sequence[int], step: int, size: int) -> tuple[Encoded, list[str]]:
    """Recordings of like length, which ones depends on the step alone."""
    start = random.Random(step).randrange(max(1, len(order) - size))
    batch = collate([states[i] for i in order[start : start + size]])
    assert isinstance(batch.audio, Tensor)
    return Encoded(audio=batch.audio, audio_lengths=batch.audio_lengths), batch.texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="JSON lines with text and split")
    parser.add_argument("states", type=Path, help="of the training speech (speech_states.py)")
    parser.add_argument("out", type=Path, help="folder of the model, and of what a stopped run goes on from")
    parser.add_argument("--language-model", required=True, help="a small Llama (language_model.py)")
    parser.add_argument("--whisper", default="openai/whisper-tiny.en")
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16], help="multiples of 4")
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector")
    parser.add_argument("--ctc-steps", type=int, default=4000)
    parser.add_argument("--text-steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates, size = arguments.rates, arguments.batch
    model = assemble(
        AssemblyConfig(
            language_model=arguments.language_model,
            whisper=arguments.whisper,
            tasks=("asr",),
            audio_rates=tuple(rates),
            strategy="MSS",
            bottleneck=32,
            lora_scale=1.0,
            compression="stack",
            projector_hidden_size=arguments.projector,
            include_frozen=True,
        )
    )
    turns = rotations(model.config.language_model.hidden_size, max(rates) // FINEST)
    arguments.out.mkdir(parents=True, exist_ok=True)

    states = CachedStates(sorted(arguments.states.glob("*.safetensors")))
    order = sorted(range(len(states)), key=states.frames.__getitem__)

    def speech(step: int) -> Tensor:
        encoded, texts = speech_batch(states, order, step, size)
        tokens = [model.tokens(encoded, "audio", rate) for rate in rates]
        pairs = zip(rates, tokens, strict=True)
        return torch.stack([ctc_loss(model, *found, texts, turns[: rate // FINEST]) for rate, found in pairs]).mean()

    learn(model, list(model.audio_proj.parameters()), speech, arguments.out / "ctc.ckpt", arguments.ctc_steps, 1e-3)

    rows = [json.loads(line) for line in arguments.texts.read_text(encoding="utf-8").splitlines()]
    texts = sorted((row["text"] for row in rows if row["split"] == "train"), key=len)
    vocabulary = model.tokenizer.get_vocab()
    noise = Noise(sorted(vocabulary, key=vocabulary.__getitem__))

    def reading(step: int) -> Tensor:
        start = random.Random(step).randrange(max(1, len(texts) - size))
        return reading_loss(
            model, texts[start : start + size], rates[step % len(rates)], turns, noise, f"reading-{step}"
        )

    # The table stays what the projectors were taught; all else of the language model, and the markers, learn.
    table = model.language_model.get_input_embeddings().weight
    trained = [p.requires_grad_() for p in model.language_model.parameters() if p is not table]
    assert model.markers is not None
    learn(model, [*trained, model.markers], reading, arguments.out / "text.ckpt", arguments.text_steps, 1e-3)
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
