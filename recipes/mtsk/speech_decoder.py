"""Teaches Whisper's decoder to read few tokens of sound: `python speech_decoder.py WHISPER STATES OUT`.

A token of rate 16 holds a third of a second, about four phonemes; Whisper's decoder has looked at sound in steps of
20 ms. With adapters of queries and values alone rate 16 fell far behind rate 4. So projectors and cross-attention learn
together, in Whisper's own shape, where a step costs a fraction of one of the Llama that `speech_start.py --taught`
makes of the result. All else of the decoder stays as it is. The loss at each rate is the cross entropy of the text and,
but for its end, the divergence from what Whisper expects when it reads every state of the clean recording. A checkpoint
is kept; a stopped run goes on. OUT gets

    taught.safetensors   decoder and projectors, averaged over the last steps, at the least development loss
    log.jsonl            what was minimized, and the cross entropy of a text token of development at each rate

Not in Llama-MTSK (arXiv 2503.06362), whose language model is a pretrained Llama.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lip_encoder import save_run
from safetensors.torch import save_file
from speech_start import Whisper, projector
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_linear_schedule_with_warmup

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.mtsk.sequence import IGNORED
from tokenthrift.mtsk.training.clips import Batch, CachedStates, collate
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.sources import fetch
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.training.sampler import bucketed_batches

DEV = 98  # recordings, as many as `speech.yaml` looks at
CLEAN = "00-*.safetensors"  # the first pass of speech_states.py, which reads the same recordings in each


class Reader(nn.Module):
    """A decoder, and for each rate a projector of stacked states.

    Args:
        decoder: of Whisper's kind.
        rates: states per token; none for a reader of every state.
        hidden_size: between the two layers of a projector.
    """

    def __init__(self, decoder: WhisperDecoder, rates: Sequence[int] = (), hidden_size: int = 1024) -> None:
        super().__init__()
        self.decoder, self.rates = decoder, tuple(rates)
        size = decoder.embed_tokens.embedding_dim
        self.audio_proj = nn.ModuleList(projector(rate, size, hidden_size) for rate in rates)

    def forward(self, states: Tensor, lengths: Tensor, ids: Tensor, rate: int | None) -> Tensor:
        """Scores (B, L, V) of what follows each token (B, L) of texts, from states (B, N, D); no rate reads all."""
        if rate is not None:
            states, lengths = pool_by_rate(states, lengths, rate, "stack")
            states = self.audio_proj[self.rates.index(rate)](states)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        context = self.decoder.context(states, length_mask(lengths))
        return self.decoder.logits(self.decoder(ids, causal, context)[0])


def rows(whisper: Whisper, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens that are read (B, L), and those that are to be written (B, L), `IGNORED` where there is none."""
    found = [whisper.ids(text) for text in texts]
    read = pad_rows([torch.tensor([*whisper.begin, *row]) for row in found])[0]
    return read, pad_rows([torch.tensor([IGNORED, *row, whisper.end]) for row in found], value=IGNORED)[0]


def losses(reader: Reader, batch: Batch, whisper: Whisper, expected: Tensor | None = None) -> Iterator[Tensor]:
    """The loss of a text token at each rate, with the divergence from what is expected, (tokens, V), if given.

    Of the end of a text nothing is to be learned from Whisper, which misses it where a recording ends without silence.
    """
    read, written = rows(whisper, batch.texts)
    targets = written[written != IGNORED]
    words, states = targets != whisper.end, batch.audio
    assert isinstance(states, Tensor)
    assert batch.audio_lengths is not None
    for rate in reader.rates:
        scores = reader(states, batch.audio_lengths, read, rate)[written != IGNORED].float().log_softmax(-1)
        loss = F.nll_loss(scores, targets)
        if expected is not None:
            loss = loss + F.kl_div(scores[words], expected[words], log_target=True, reduction="batchmean")
        yield loss


@torch.no_grad()
def teacher_scores(teacher: Reader, batch: Batch, whisper: Whisper) -> Tensor:
    """(tokens, V) logarithms of the probabilities that a reader of every state gives."""
    read, written = rows(whisper, batch.texts)
    lengths: Any = batch.audio_lengths
    return teacher(batch.audio, lengths, read, None)[written != IGNORED].float().log_softmax(-1)


@torch.no_grad()
def development(reader: Reader, batches: Sequence[Batch], whisper: Whisper) -> dict[int, float]:
    """The mean loss of a text token at each rate."""
    sums, count = torch.zeros(len(reader.rates)), 0
    for batch in batches:
        tokens = int((rows(whisper, batch.texts)[1] != IGNORED).sum())
        sums += tokens * torch.stack(list(losses(reader, batch, whisper)))
        count += tokens
    return {rate: round(value, 4) for rate, value in zip(reader.rates, (sums / count).tolist(), strict=True)}


def open_states(folder: Path) -> tuple[CachedStates, CachedStates, CachedStates]:
    """All passes over the training recordings, the clean one alone, and development.

    Raises:
        SystemExit: something is missing, or the passes are over different recordings.
    """
    found = []
    for pattern in ("train/*.safetensors", f"train/{CLEAN}", "dev/*.safetensors"):
        if not (shards := sorted(folder.glob(pattern))):
            raise SystemExit(f"no states of {folder / pattern}: run speech_states.py")
        found.append(CachedStates(shards))
    train, clean, dev = found
    # A later pass may have been stopped before its end.
    if any(text != clean.texts[i % len(clean)] for i, text in enumerate(train.texts)):
        raise SystemExit(f"{folder / 'train'} has passes over different recordings")
    return train, clean, dev


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="an English Whisper, folder or Hub id")
    parser.add_argument("states", type=Path, help="`train` and `dev` of speech_states.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--vocabulary", type=int, default=16_000, help="most tokens to keep, as for speech_start.py")
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector, likewise")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seconds", type=float, default=48, help="of speech in a step")
    parser.add_argument("--decoder-rate", type=float, default=2e-4, help="learning rate of the cross-attention")
    parser.add_argument("--projector-rate", type=float, default=4e-5, help="of projectors, whose sums are longer")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order, and of units of projectors that a mean leaves over"
    )
    parser.add_argument("--every", type=int, default=350, help="steps between looks at development recordings")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    files = ("config.json", "model.safetensors", "tokenizer.json")
    whisper = Whisper(fetch(arguments.whisper, files), arguments.vocabulary)
    teacher = Reader(copy.deepcopy(whisper.decoder)).requires_grad_(False)
    reader = Reader(whisper.decoder, arguments.rates, arguments.projector)
    for name, weight in reader.decoder.named_parameters():
        weight.requires_grad_("encoder_attn" in name)
    average = AveragedModel(reader, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    decoder = [weight for weight in reader.decoder.parameters() if weight.requires_grad]
    groups = [
        {"params": decoder, "lr": arguments.decoder_rate},
        {"params": list(reader.audio_proj.parameters()), "lr": arguments.projector_rate},
    ]
    learning_rates = [arguments.decoder_rate, arguments.projector_rate]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, min(50, arguments.steps // 10), arguments.steps)
    parts: dict[str, Any] = {"reader": reader, "average": average, "optimizer": optimizer, "schedule": schedule}
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done, best = arguments.out / "training.ckpt", 0, float("inf")
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, best = state["step"], state["best"]
        if (state["seed"], state["rates"]) != (arguments.seed, learning_rates):
            raise SystemExit(f"{kept} is of a run with another seed or other learning rates; take another OUT")

    train, clean, dev = open_states(arguments.states)
    chosen = random.Random(0).sample(range(len(dev)), min(DEV, len(dev)))
    looks = [collate([dev[i] for i in chosen[k : k + 16]]) for k in range(0, len(chosen), 16)]
    sampler = bucketed_batches(train.frames, int(25 * arguments.seconds), seed=arguments.seed, bucket=20)
    sampler.start(0, done)
    stream = chain.from_iterable(repeat(sampler))
    seen: list[float] = []
    for step in range(done + 1, arguments.steps + 1):
        keys = next(stream)
        batch = collate([train[key] for key in keys])
        same = collate([clean[key[1] % len(clean)] for key in keys])
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss = torch.stack(list(losses(reader, batch, whisper, teacher_scores(teacher, same, whisper)))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(reader)
        seen.append(loss.item())
        if step % arguments.every == 0 or step == arguments.steps:
            found = development(average.module, looks, whisper)
            if sum(found.values()) < best:
                best = sum(found.values())
                save_file(average.module.state_dict(), arguments.out / "taught.safetensors")
            state = {"step": step, "best": best, "seed": arguments.seed, "rates": learning_rates}
            save_run(kept, {name: part.state_dict() for name, part in parts.items()} | state)
            line = json.dumps({"step": step, "train": round(sum(seen) / len(seen), 4), "dev": found})
            with (arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            seen = []


if __name__ == "__main__":
    main()
