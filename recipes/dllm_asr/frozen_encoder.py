"""Draft and decoder over Whisper's own encoder: `python frozen_encoder.py STATES OUT --start MODEL`.

An encoder that learns on some hours of speech (`together.py`) forgets voices that Whisper knew, and a decoder that
learns with it forgets words. Here the encoder is Whisper's and stays, so its states are made once, by
`recipes/mtsk/speech_states.py`: STATES has `train` and `dev`, of recordings and of synthetic speech, clean and noisy.
The decoder begins as a share of Whisper's and of the model's. Left to right it learns to read few states, and where a
cropped recording ends, and is held to what Whisper itself expects of the clean recording (`teacher.py`); without its
causal mask it learns to correct what the draft head writes in that very step. Most of it is in the cross-attention; the
rest has a rate of its own.

    OUT/               the model folder, averaged over the last steps
    OUT/training.ckpt  from which a stopped run goes on, to another number of steps if one is given
    OUT/log.jsonl      losses of training and development, means of batches: CTC in nats a character, the others in
                       nats a token
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from teacher import Teacher, divergence
from together import causal_scores, denoising_loss, token_ids, with_pools
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_linear_schedule_with_warmup

from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.draft import character_ids, ctc_loss
from tokenthrift.dllm_asr.pretrained import take_whisper
from tokenthrift.dllm_asr.training.corruption import time_mask
from tokenthrift.mtsk.training.clips import Clip, open_passes
from tokenthrift.padding import pad_rows
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.training.sampler import endless_batches

DEV = 98  # recordings
MASKED = 0.05  # share of the states of a recording that are hidden


def take_decoder(model: DllmAsr, whisper: str, share: float) -> None:
    """Gives a model Whisper's encoder, and a share of Whisper's decoder; MASK and DELETE, which it lacks, stay."""
    vocabulary, embedding = model.vocabulary, decoder_of(model).embed_tokens.weight
    own = {name: value.clone() for name, value in decoder_of(model).state_dict().items()}
    take_whisper(model, whisper)
    with torch.no_grad():
        for name, value in decoder_of(model).state_dict().items():
            value.lerp_(own[name], 1 - share)
        for token in (vocabulary.mask_id, vocabulary.delete_id):
            embedding[token] = own["embed_tokens.weight"][token]


def states_of(clips: Sequence[Clip], later: int = 0) -> tuple[Tensor, Tensor]:
    """States (B, N, D) and lengths (B,); each begins so many states later, so that means are of others."""
    found: list[Any] = [clip.audio for clip in clips]
    rows = [torch.cat([row[:1].expand(later, -1), row]).float() for row in found]
    return pad_rows(rows)[0], torch.tensor([len(row) for row in rows])


def losses(
    model: DllmAsr,
    states: Tensor,
    lengths: Tensor,
    texts: list[str],
    seed: int,
    pool: int,
    denoise: bool = True,
    expected: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of a batch by name.

    Args:
        model: it learns.
        states: of the encoder, (B, N, D).
        lengths: (B,).
        texts: lower-case words.
        seed: of what is shown to the denoising reading.
        pool: states of which the decoder reads the mean.
        denoise: with the loss of the denoising reading.
        expected: (tokens, V) what a teacher expects, if any.
    """
    log_p = model.draft(states, lengths)
    context = model.backbone.context(*model.adapter(states, lengths, pool))
    scores, targets = causal_scores(model, context, texts)
    scores = scores.float()
    out = {
        "ctc": ctc_loss(log_p, lengths, [character_ids(text) for text in texts]),
        "causal": F.cross_entropy(scores, targets),
    }
    if expected is not None:
        out["teacher"] = divergence(scores, targets, expected, model.vocabulary.eos_id)
    if denoise:
        rng = random.Random(seed)
        out["denoising"] = denoising_loss(model, context, texts, lengths, log_p.detach(), rng, pool)
    return out


@torch.no_grad()
def development(model: DllmAsr, clips: Sequence[Clip], size: int = 16) -> dict[str, float]:
    """The mean of each loss over development recordings, at the pooling of the model."""
    sums: dict[str, float] = {}
    for first in range(0, len(clips), size):
        some = clips[first : first + size]
        found = losses(model, *states_of(some), [clip.text for clip in some], first, model.config.adapter.pool)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(some) / len(clips)
    return {name: round(value, 4) for name, value in sums.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", type=Path, help="`train` and `dev` of speech_states.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, required=True, help="model folder: sizes, tokens, draft head")
    parser.add_argument("--whisper", default="openai/whisper-tiny.en", help="transformers checkpoint")
    parser.add_argument("--whisper-share", type=float, default=1.0, help="of its decoder, not the model's, to begin")
    parser.add_argument("--pools", type=int, nargs="+", default=[2, 2, 2, 1, 4, 8], help="one drawn for each batch")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=48, help="of speech in a step")
    parser.add_argument("--draft-rate", type=float, default=4e-4)
    parser.add_argument("--cross-rate", type=float, default=2e-4, help="of the decoder's cross-attention")
    parser.add_argument("--decoder-rate", type=float, default=2e-5, help="of the rest of the decoder")
    parser.add_argument("--denoising-weight", type=float, default=0.3, help="of its loss, a step on average")
    parser.add_argument("--denoise-every", type=int, default=2, help="steps between two with the denoising loss")
    parser.add_argument("--seed", type=int, default=0, help="of the order of batches")
    parser.add_argument("--every", type=int, default=500, help="steps between looks at development recordings")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    try:
        train, clean, dev = open_passes(arguments.states)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    model = DllmAsr.from_pretrained(arguments.start).float()
    with_pools(model, arguments.pools)
    take_decoder(model, arguments.whisper, arguments.whisper_share)
    decoder = decoder_of(model)
    teacher = Teacher(arguments.whisper, model.vocabulary, model.config.backbone.max_position_embeddings)
    cross: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in decoder.named_parameters():
        (cross if "encoder_attn" in name else rest).append(weight)
    future = [weight for name, weight in model.backbone.named_parameters() if not name.startswith("decoder.")]
    groups: list[dict[str, Any]] = [
        {"params": [*model.draft.parameters()], "lr": arguments.draft_rate},
        {"params": cross, "lr": arguments.cross_rate},
        {"params": rest, "lr": arguments.decoder_rate},
        {"params": future, "lr": arguments.cross_rate, "weight_decay": 0.0},
    ]
    learned = [weight for group in groups for weight in group["params"]]
    model.requires_grad_(False)
    for weight in learned:
        weight.requires_grad_(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done = arguments.out / "training.ckpt", 0
    begun = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "steps", "every")}
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, min(50, arguments.steps // 10), arguments.steps)
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        if state["begun"] != begun:
            raise SystemExit(f"{kept} was begun with {state['begun']}, not with {begun}; take another OUT")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["step"]
    looks = [dev[i] for i in random.Random(0).sample(range(len(dev)), min(DEV, len(dev)))]
    size = int(25 * arguments.seconds)
    stream = endless_batches(train.frames, size, seed=arguments.seed, bucket=20, first=done)
    weights = {"denoising": arguments.denoising_weight * arguments.denoise_every}
    sums: dict[str, list[float]] = {}
    for step in range(done + 1, arguments.steps + 1):
        numbers, rng = next(stream), random.Random(step)
        texts = [train.texts[i] for i in numbers]
        states, lengths = states_of([train[i] for i in numbers], rng.randrange(max(arguments.pools)))
        states = time_mask(states, lengths, MASKED, [rng.getrandbits(31) for _ in numbers])
        denoise, pool = step % arguments.denoise_every == 0, rng.choice(arguments.pools)
        same = states_of([clean[i % len(clean)] for i in numbers])
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            expected = teacher.read(*same, token_ids(model, texts))
            found = losses(model, states, lengths, texts, rng.getrandbits(31), pool, denoise, expected)
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in found.items()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        for name, value in found.items():
            sums.setdefault(name, []).append(value.item())
        if step % arguments.every == 0 or step == arguments.steps:
            looked = development(average.module, looks)
            # The last, not the one of the least loss: with a high learning rate texts get worse before the loss does.
            average.module.save_pretrained(arguments.out, dtype=torch.float16)
            progress = {"step": step, "begun": begun}
            partial = kept.with_suffix(".partial")
            torch.save({name: part.state_dict() for name, part in parts.items()} | progress, partial)
            os.replace(partial, kept)
            trained = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
            line = json.dumps({"step": step, "train": trained, "dev": looked})
            with (arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            sums = {}


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so not where tests import this
    main()
