"""Encoder, draft and decoder trained together on real speech: `python together.py SPEECH OUT --start MODEL`.

A frozen encoder that was made for attention holds the CTC draft back. Here the encoder (but for its lowest layers) has
a share in all that is asked of it, of recordings augmented as in `features.py` and with parts of the spectrogram hidden
(SpecAugment, Park et al., 2019):

- the CTC loss of the draft head, and the left-to-right loss of the decoder (hybrid CTC / attention, Watanabe et al.,
  2017);
- the denoising loss of the same decoder, without its causal mask, on what the draft head writes in that very step;
- every few steps, the distance of its states from those of the encoder that the training started with.

So one decoder has two readings with the same weights. Each batch is read at one of several rates (`--pools`; Matryoshka
training, Kusupati et al., 2022), so that a token budget may choose one. `--whisper` takes encoder and decoder from a
Whisper checkpoint anew, as a decoder that was trained on little speech may have lost what Whisper knew. With
`--teacher` the left-to-right reading also learns what a Whisper expects (`teacher.py`). `OUT` becomes a model folder; a
stopped run goes on from `OUT/training.pt` with the options it was begun with. Shards are read `--shards` at a time.
Their rows of split "train" are used; clips of shards of very short ones (mean below 3 s) are joined, as in
`features.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from features import RATE, Utterance, augment, join, read_folder
from teacher import Teacher, divergence
from torch import Tensor

from tokenthrift.backbones.masked import Context
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.draft import character_ids, ctc_loss, draft_words
from tokenthrift.dllm_asr.model import STATE_RATE
from tokenthrift.dllm_asr.pretrained import take_whisper
from tokenthrift.dllm_asr.training.config import ExampleConfig
from tokenthrift.dllm_asr.training.corruption import diffusion_loss
from tokenthrift.dllm_asr.training.examples import build_batch
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.training.optim import OptimConfig, adamw, parameter_groups
from tokenthrift.whisper import log_mel, pad_mels

SHORT_CLIPS, JOINED = 3.0, 12.0  # seconds: mean clip of a shard whose clips are joined, and the longest string
LONGEST = 20.0  # seconds; longer clips are left out
EXAMPLES = ExampleConfig(from_draft_prob=0.9, partially_decoded_prob=0.5)
SAVE_SECONDS = 240.0
WARMUP = 40  # steps


@dataclass(frozen=True)
class Weights:
    """Of the losses, in nats a character (CTC) and a token."""

    ctc: float = 2.5
    causal: float = 1.0
    denoising: float = 1.0
    distance: float = 2.0
    teacher: float = 1.0


def read_clips(shard: Path) -> list[Utterance]:
    """Training clips of a shard, float in [-1, 1], and their texts."""
    with np.load(shard) as data:
        audio, offset, rows = torch.from_numpy(data["audio"]), data["offset"], json.loads(str(data["rows"]))
    return [
        (audio[a:b], row["text"])
        for a, b, row in zip(offset, offset[1:], rows, strict=False)
        if row["split"] == "train" and b - a <= LONGEST * RATE
    ]


def utterances(shard: Path, clips: list[Utterance], rng: random.Random) -> list[Utterance]:
    """Clips of a shard as they are trained on: one by one, or joined where they are very short."""
    normalized = [(audio.float() / 32768, text) for audio, text in clips]
    joined = sum(len(audio) for audio, _ in normalized) < SHORT_CLIPS * RATE * len(normalized)
    return join(normalized, rng, JOINED) if joined else normalized


def batches(
    shards: list[Path],
    noises: list[Tensor],
    rooms: list[Tensor],
    *,
    seconds: float,
    together: int,
    repeats: int,
    start: int,
) -> Iterator[tuple[list[Utterance], list[Utterance], int]]:
    """Endless batches of utterances of like length, augmented and clean, from the `start`-th on, each with a seed.

    The n-th batch is the same in every run. Shards `9000-*` (prompts of one speaker) come `repeats` times an epoch.
    """
    number, kept = 0, {}
    for epoch in range(1 << 31):
        rng = random.Random(epoch)
        order = rng.sample(shards, len(shards))
        for first in range(0, len(order), together):
            chosen = order[first : first + together]
            kept = {shard: kept[shard] if shard in kept else read_clips(shard) for shard in chosen}
            examples: list[Utterance] = []
            for shard in chosen:
                for _ in range(repeats if shard.name.startswith("9000") else 1):
                    examples += utterances(shard, kept[shard], rng)
            for rows in by_length([len(audio) for audio, _ in examples], seconds * RATE, rng):
                seed = rng.getrandbits(31)
                if number >= start:
                    one = random.Random(seed)
                    clean = [examples[i] for i in rows]
                    yield [(augment(audio, one, noises, rooms), text) for audio, text in clean], clean, seed
                number += 1


def by_length(lengths: list[int], most: float, rng: random.Random) -> list[list[int]]:
    """Indices in batches of about one length, each of at most so much with padding, in random order."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1)):
        longest = max(lengths[i], *(lengths[j] for j in made[-1])) if made else 0
        if not made or longest * (len(made[-1]) + 1) > most:
            made.append([])
        made[-1].append(i)
    rng.shuffle(made)
    return made


def hide(mels: Tensor, frames: Tensor, rng: random.Random) -> Tensor:
    """Two bands of up to 14 bins, and 6 % of the time in spans of up to 0.3 s, set to the mean of each recording."""
    mels = mels.clone()
    for row, length in zip(mels, frames.tolist(), strict=True):
        mean = row[:, :length].mean()
        for _ in range(2):
            low, bins = rng.randrange(row.shape[0]), rng.randint(0, 14)
            row[low : low + bins] = mean
        for _ in range(max(1, round(length * 0.06 / 15))):
            at, span = rng.randrange(max(1, length)), rng.randint(1, 30)
            row[:, at : at + span] = mean
    return mels


def token_ids(model: DllmAsr, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts, as many as the decoder reads."""
    longest = model.config.backbone.max_position_embeddings - 1
    return [[t for w in text.split() for t in model.vocabulary.word(w)][:longest] for text in texts]


def causal_scores(model: DllmAsr, context: Context, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Scores (tokens, V) of the next token, left to right, and the tokens (tokens,), ends of texts included."""
    decoder, vocabulary, ids = decoder_of(model), model.vocabulary, token_ids(model, texts)
    inputs, _ = pad_rows([torch.tensor([vocabulary.start_id, *t]) for t in ids], value=vocabulary.eos_id)
    targets, used = pad_rows([torch.tensor([*t, vocabulary.eos_id]) for t in ids])
    # Padding is on the right, so a causal mask already hides it from every real position.
    causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
    hidden, _ = decoder(inputs, causal, context)
    return decoder.logits(hidden[used]), targets[used]


def denoising_loss(
    model: DllmAsr, context: Context, texts: list[str], lengths: Tensor, log_p: Tensor, rng: random.Random, pool: int
) -> Tensor:
    """The diffusion loss on responses that start from what the draft head writes now."""
    drafts = [draft_words(row[:n]) for row, n in zip(log_p, lengths.tolist(), strict=True)]
    seconds, seeds = (lengths / STATE_RATE).tolist(), [rng.getrandbits(31) for _ in texts]
    slots = model.max_slots(int(lengths.max()))
    made = build_batch(texts, seconds, drafts, seeds, model.vocabulary, EXAMPLES, max_slots=slots)
    windows = made.windows * (STATE_RATE / (pool * model.config.adapter.stride))
    logits = model.backbone(made.corrupted.ids, made.mask, context, windows, made.hints)
    return diffusion_loss(logits, made.targets, made.mask, made.corrupted, visible_weight=0.2)


def losses(
    model: DllmAsr,
    encoder: torch.nn.Module | None,
    examples: list[Utterance],
    seed: int,
    weights: Weights,
    pools: tuple[int, ...] = (),
    denoise: bool = True,
    expected: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted losses of a batch by name; all that is random about them comes from `seed`.

    Args:
        model: it learns.
        encoder: whose states its own are to be near, if any.
        examples: augmented recordings and their texts.
        seed: of this batch.
        weights: of the losses.
        pools: poolings of which one is drawn; none for that of the model.
        denoise: with the denoising loss.
        expected: (tokens, V) what a teacher expects of the texts, if any.
    """
    rng, texts = random.Random(seed), [text for _, text in examples]
    mels, lengths = pad_mels([log_mel(audio, model.config.encoder.num_mel_bins) for audio, _ in examples])
    states = model.encoder(hide(mels, 2 * lengths, rng), lengths)
    log_p = model.draft(states, lengths)
    pool = rng.choice(pools) if pools else model.config.adapter.pool
    context = model.backbone.context(*model.adapter(states, lengths, pool))
    scores, targets = causal_scores(model, context, texts)
    out = {
        "ctc": weights.ctc * ctc_loss(log_p, lengths, [character_ids(text) for text in texts]),
        "causal": weights.causal * F.cross_entropy(scores, targets, label_smoothing=0.05),
    }
    if expected is not None:
        out["teacher"] = weights.teacher * divergence(scores, targets, expected, model.vocabulary.eos_id)
    if denoise:
        loss = denoising_loss(model, context, texts, lengths, log_p.detach(), rng, pool)
        out["denoising"] = weights.denoising * loss
    if encoder is not None:
        with torch.no_grad():
            wanted = encoder(mels, lengths)
        valid = length_mask(lengths, states.shape[1])
        error = (states - wanted)[valid].square().sum() / wanted[valid].square().sum()
        out["distance"] = weights.distance * error
    return out


def trained(model: DllmAsr, frozen: int, encoder: float, draft: float, decoder: float) -> list[dict[str, Any]]:
    """Parameter groups; the convolutions and the lowest `frozen` layers of the encoder stay as they are."""
    model.requires_grad_(True)
    if frozen:
        for part in (model.encoder.conv1, model.encoder.conv2, *model.encoder.layers[:frozen]):
            part.requires_grad_(False)
    groups = []
    for rate, part in (
        (encoder, model.encoder),
        (draft, model.draft),
        (decoder, model.adapter),
        (decoder, model.backbone),
    ):
        # The bias of the fading causal mask is a table of (layers, heads), not a matrix.
        groups += parameter_groups(part, OptimConfig(), learning_rate=rate, no_decay=("*future",))
    return groups


def deeper(model: DllmAsr, layers: int) -> DllmAsr:
    """The same model with so many layers in its draft head; a new layer changes nothing before it is trained."""
    sizes = replace(model.config.draft, num_hidden_layers=layers)
    grown = DllmAsr(replace(model.config, draft=sizes), model.vocabulary)
    grown.load_state_dict(grown.state_dict() | model.state_dict())
    for layer in grown.draft.layers[model.config.draft.num_hidden_layers :]:
        for part in (layer.self_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    return grown


def with_pools(model: DllmAsr, pools: list[int]) -> None:
    """Writes into the configuration which poolings a budget may choose."""
    trained = tuple(sorted({*pools, model.config.adapter.pool}))
    model.config = replace(model.config, adapter=replace(model.config.adapter, pools=trained))
    model.adapter.config = model.config.adapter


def share_of_rate(step: int, done: float) -> float:
    """Linear warm-up over `WARMUP` steps, and half a cosine to 2 % over the run."""
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="folder of speech shards, from recordings.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, required=True, help="model folder to begin with")
    parser.add_argument("--whisper", help="transformers checkpoint whose encoder and decoder to begin with instead")
    parser.add_argument("--teacher", help="transformers checkpoint whose expectations of a text to learn")
    parser.add_argument("--draft-layers", type=int, help="layers of the draft head, where it is to have more")
    parser.add_argument(
        "--pools",
        type=int,
        nargs="+",
        default=[2, 2, 2, 1, 4, 8],
        help="encoder states a position that the decoder reads, one drawn for each batch (default: %(default)s)",
    )
    parser.add_argument("--noise", type=Path, help="folder of noise*.flac and rir*.flac")
    parser.add_argument("--shards", type=int, default=40, help="read at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="passes over Asterisk prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="the schedule ends here if not at --steps before")
    parser.add_argument("--seconds", type=float, default=64.0, help="of audio in a batch (default: %(default)s)")
    parser.add_argument("--frozen-layers", type=int, default=1, help="of the encoder, from the lowest on")
    for name, value in vars(Weights()).items():
        parser.add_argument(f"--{name}-weight", type=float, default=value, help="of the loss (default: %(default)s)")
    parser.add_argument("--denoise-every", type=int, default=1, help="steps between two with the denoising loss")
    parser.add_argument("--distance-every", type=int, default=8, help="steps; 0 leaves the distance out")
    parser.add_argument("--encoder-rate", type=float, default=5e-5)
    parser.add_argument("--draft-rate", type=float, default=3e-4)
    parser.add_argument("--decoder-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shards = sorted(arguments.speech.glob("*.npz"))
    if not shards:
        parser.error(f"{arguments.speech} holds no shards of speech")
    noises, rooms = read_folder(arguments.noise, "noise*.flac"), read_folder(arguments.noise, "rir*.flac")
    model = DllmAsr.from_pretrained(arguments.start).float().train()
    weights = Weights(**{name: getattr(arguments, f"{name}_weight") for name in vars(Weights())})
    if arguments.draft_layers:
        model = deeper(model, arguments.draft_layers).train()
    with_pools(model, arguments.pools)
    teacher: Teacher | None = None
    try:
        if arguments.whisper:
            take_whisper(model, arguments.whisper)
        if arguments.teacher:
            longest = model.config.backbone.max_position_embeddings
            teacher = Teacher(arguments.teacher, model.vocabulary, longest)
    except ValueError as error:
        parser.error(str(error))
    encoder = copy.deepcopy(model.encoder).eval().requires_grad_(False)
    groups = trained(
        model, arguments.frozen_layers, arguments.encoder_rate, arguments.draft_rate, arguments.decoder_rate
    )
    optimizer = adamw(groups, OptimConfig())
    rates = [group["lr"] for group in groups]
    arguments.out.mkdir(parents=True, exist_ok=True)
    first, spent, state = 0, 0.0, arguments.out / "training.pt"
    begun = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float | str | list)}
    for name in ("threads", "minutes"):
        begun.pop(name, None)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["begun"] != begun:
            parser.error(f"{state} was begun with {saved['begun']}, not with {begun}: give another folder")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, spent = saved["step"], saved["seconds"]
    feed = batches(
        shards,
        noises,
        rooms,
        seconds=arguments.seconds,
        together=arguments.shards,
        repeats=arguments.repeats,
        start=first,
    )
    parameters = [p for group in groups for p in group["params"]]
    now = saved_at = time.perf_counter()
    started, sums = now - spent, {}
    for step in range(first, arguments.steps + 1):
        now = time.perf_counter()
        done = step / arguments.steps
        if arguments.minutes:
            done = max(done, (now - started) / 60 / arguments.minutes)
        if done >= 1 or now - saved_at > SAVE_SECONDS:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            kept |= {"step": step, "seconds": now - started, "begun": begun}
            torch.save(kept, state.with_suffix(".partial"))
            os.replace(state.with_suffix(".partial"), state)
            model.save_pretrained(arguments.out, dtype=torch.float16)
            saved_at = time.perf_counter()
        if step % 20 == 0 and sums:
            shown = [f"{name} {sum(values) / len(values):.4f}" for name, values in sums.items()]
            print(f"step {step}:", *shown, f"{now - started:.0f} s", sep=" | ", flush=True)
            sums = {}
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share_of_rate(step, done)
        examples, clean, seed = next(feed)
        guided = arguments.distance_every and step % arguments.distance_every == 0
        denoise, pools = step % arguments.denoise_every == 0, tuple(arguments.pools)
        expected = None
        if teacher is not None:
            expected = teacher([audio for audio, _ in clean], token_ids(model, [text for _, text in clean]))
        parts = losses(model, encoder if guided else None, examples, seed, weights, pools, denoise, expected)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in parts.items():
            sums.setdefault(name, []).append(value.item())


if __name__ == "__main__":
    main()
