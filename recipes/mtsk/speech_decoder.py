"""Teaches Whisper's decoder to read few tokens of sound and lips: `python speech_decoder.py WHISPER STATES OUT`.

A token of rate 16 holds a third of a second, about four phonemes; Whisper's decoder has looked at sound in steps of
20 ms. Adapters of queries and values do not teach it to take a token apart. So projectors and the whole decoder learn
it together, in Whisper's own shape, where a step costs a fraction of one of the Llama that `speech_start.py --taught`
makes of the result. The loss at each scale is the cross entropy of the text and the divergence from what Whisper
expects when it reads every state of the clean recording, so that nine hours of speech do not make it forget what it
knows. Spans of sound are hidden by chance. A checkpoint is kept; a stopped run goes on. OUT gets

    taught.safetensors   decoder and projectors, averaged over the last steps, at the least development loss
    log.jsonl            losses of a text token

With `--video-rates` the model reads lips too, from states of `speech_states.py --avhubert`. A video token begins as the
sound token that the lips let one expect: its projector first learns to give the mean of the states of clean sound over
its time. Video states carry positions, which sound states have from Whisper's encoder.

Not in Llama-MTSK (arXiv 2503.06362), whose language model is a pretrained Llama, and whose projectors start at random.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lip_encoder import save_run
from safetensors.torch import load_file, save_file
from speech_start import Whisper, projector
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_linear_schedule_with_warmup

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.mtsk import Rates
from tokenthrift.mtsk.config import scales_of
from tokenthrift.mtsk.network import projectors
from tokenthrift.mtsk.sequence import IGNORED, Encoded
from tokenthrift.mtsk.training.clips import Batch, CachedStates, collate
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.sources import fetch
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.training.sampler import bucketed_batches
from tokenthrift.whisper import sinusoids

DEV = 98  # recordings, those of the development loss
CLEAN = "00-*.safetensors"  # the first pass of speech_states.py, which reads the same recordings in each


class Reader(nn.Module):
    """A decoder, and for each rate a projector of stacked states.

    Args:
        decoder: of Whisper's kind.
        audio_rates: sound states per token; none for a reader of every state.
        video_rates: states of lips per token.
        hidden_size: between the two layers of a projector.
        video_size: width of the states of lips.
    """

    def __init__(
        self,
        decoder: WhisperDecoder,
        audio_rates: Sequence[int] = (),
        video_rates: Sequence[int] = (),
        hidden_size: int = 1024,
        video_size: int = 1,
    ) -> None:
        super().__init__()
        self.decoder, self.rates = decoder, {"audio": tuple(audio_rates), "video": tuple(video_rates)}
        size = decoder.embed_tokens.embedding_dim
        self.audio_proj = nn.ModuleList(projector(rate, size, hidden_size) for rate in audio_rates)
        self.video_proj = projectors(video_rates, video_size, hidden_size, size, "stack", norm=False)
        tasks = ("asr", "avsr") if video_rates else ("asr",)
        self.scales = scales_of(tasks, self.rates["audio"], self.rates["video"])

    def tokens(self, encoded: Encoded, modality: str, rate: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, D) of one modality, and how many each item has, (B,); as in `LlamaMtsk.tokens`."""
        states, lengths = getattr(encoded, modality), getattr(encoded, f"{modality}_lengths")
        if modality == "video":
            states = states + sinusoids(*states.shape[1:])
        stacked, counts = pool_by_rate(states, lengths, rate, "stack")
        return getattr(self, f"{modality}_proj")[self.rates[modality].index(rate)](stacked), counts

    def forward(self, encoded: Encoded, ids: Tensor, rates: Rates | None) -> Tensor:
        """Scores (B, L, V) of what follows each token (B, L) of texts; without rates from every state of sound."""
        if rates is None:
            parts: list[Any] = [(encoded.audio, encoded.audio_lengths)]
        else:
            asked = (("audio", rates.audio), ("video", rates.video))
            parts = [self.tokens(encoded, modality, rate) for modality, rate in asked if rate]
        memory = torch.cat([tokens for tokens, _ in parts], 1)
        seen = torch.cat([length_mask(counts, tokens.shape[1]) for tokens, counts in parts], 1)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return self.decoder.logits(self.decoder(ids, causal, self.decoder.context(memory, seen))[0])


def encoded_of(batch: Batch) -> Encoded:
    """The states of a batch."""
    names = ("audio", "audio_lengths", "video", "video_lengths")
    return Encoded(**{name: getattr(batch, name) for name in names})


def rows(whisper: Whisper, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens that are read (B, L), and those that are to be written (B, L), `IGNORED` where there is none."""
    found = [whisper.ids(text) for text in texts]
    read = pad_rows([torch.tensor([*whisper.begin, *row]) for row in found])[0]
    return read, pad_rows([torch.tensor([IGNORED, *row, whisper.end]) for row in found], value=IGNORED)[0]


def hide_spans(states: Tensor, lengths: Tensor, share: float, rng: random.Random) -> Tensor:
    """States (B, N, D) with about this share of them zero, in spans of 1 to 16."""
    out = states.clone()
    for row, length in zip(out, lengths.tolist(), strict=True):
        for _ in range(round(share * length / 8.5)):
            start = rng.randrange(length)
            row[start : start + rng.randint(1, 16)] = 0
    return out


def expected_sound(encoded: Encoded, rate: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(B, n, D) means of sound states over the time of each video token, and (B, n) where there are any.

    Args:
        encoded: states of sound and of lips.
        rate: video states per token; there are twice as many of sound.
        tokens: n, of video.
    """
    assert encoded.audio is not None
    assert encoded.audio_lengths is not None
    means, counts = pool_by_rate(encoded.audio, encoded.audio_lengths, 2 * rate)
    means = F.pad(means, (0, 0, 0, max(0, tokens - means.shape[1])))[:, :tokens]
    return means, torch.arange(tokens) < counts[:, None]


def expect(reader: Reader, data: CachedStates, rate: int, steps: int, learning_rate: float = 1e-3) -> float:
    """Trains the projector of a video rate on what sound is expected; returns the variance explained at the end."""
    optimizer = torch.optim.Adam(reader.video_proj[reader.rates["video"].index(rate)].parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    explained: list[float] = []
    rng = random.Random(0)
    for _ in range(steps):
        encoded = encoded_of(collate([data[i] for i in rng.sample(range(len(data)), min(32, len(data)))]))
        tokens, counts = reader.tokens(encoded, "video", rate)
        target, there = expected_sound(encoded, rate, tokens.shape[1])
        there &= torch.arange(tokens.shape[1]) < counts[:, None]
        loss = F.mse_loss(tokens[there], target[there])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        explained.append(1 - loss.item() / float(target[there].var(0, unbiased=False).mean()))
    return sum(explained[-20:]) / len(explained[-20:])


def losses(
    reader: Reader,
    encoded: Encoded,
    texts: tuple[Tensor, Tensor],
    scales: Sequence[Rates],
    end: int,
    expected: Tensor | None = None,
) -> Iterator[Tensor]:
    """The loss of a text token at each scale, with the divergence from what is expected, (tokens, V), if given.

    Of the end of a text nothing is to be learned from Whisper, which misses it where a recording has no silence.
    """
    read, written = texts
    targets = written[written != IGNORED]
    words = targets != end
    for rates in scales:
        scores = reader(encoded, read, rates)[written != IGNORED].float().log_softmax(-1)
        loss = F.nll_loss(scores, targets)
        if expected is not None:
            loss = loss + F.kl_div(scores[words], expected[words], log_target=True, reduction="batchmean")
        yield loss


@torch.no_grad()
def development(reader: Reader, batches: Sequence[Batch], whisper: Whisper) -> list[float]:
    """The mean loss of a text token at each scale."""
    sums, count = torch.zeros(len(reader.scales)), 0
    for batch in batches:
        texts = rows(whisper, batch.texts)
        tokens = int((texts[1] != IGNORED).sum())
        sums += tokens * torch.stack(list(losses(reader, encoded_of(batch), texts, reader.scales, whisper.end)))
        count += tokens
    return [round(value, 4) for value in (sums / count).tolist()]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="an English Whisper, folder or Hub id")
    parser.add_argument("states", type=Path, help="`train` and `dev` of speech_states.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="taught.safetensors of another run, of the same sizes")
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--video-rates", type=int, nargs="*", default=[], help="none for sound alone")
    parser.add_argument("--vocabulary", type=int, default=16_000, help="most tokens to keep, as for speech_start.py")
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector, likewise")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--expect-steps", type=int, default=150, help="of what sound the lips let one expect")
    parser.add_argument("--scales-per-step", type=int, default=2, help="at random")
    parser.add_argument("--seconds", type=float, default=48, help="of speech in a step")
    parser.add_argument("--decoder-rate", type=float, default=1e-4, help="learning rate of the decoder")
    parser.add_argument("--projector-rate", type=float, default=2e-5, help="of projectors, whose sums are longer")
    parser.add_argument("--hidden", type=float, default=0.1, help="share of sound states that are hidden")
    parser.add_argument("--every", type=int, default=400, help="steps between looks at development recordings")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = ("config.json", "model.safetensors", "tokenizer.json")
    whisper = Whisper(fetch(arguments.whisper, files), arguments.vocabulary)
    shards = {part: sorted((arguments.states / part).glob("*.safetensors")) for part in ("train", "dev")}
    train, dev = (CachedStates(paths) for paths in shards.values())
    clean = CachedStates(sorted((arguments.states / "train").glob(CLEAN)))
    lips = 0 if train[0].video is None else train[0].video.shape[-1]
    teacher = Reader(copy.deepcopy(whisper.decoder)).requires_grad_(False)
    reader = Reader(whisper.decoder, arguments.rates, arguments.video_rates, arguments.projector, lips)
    if arguments.start is not None:
        reader.load_state_dict(load_file(arguments.start), strict=False)  # it may have no lips
    for table in (reader.decoder.embed_tokens, reader.decoder.embed_positions):
        table.requires_grad_(False)
    decoder = [weight for weight in reader.decoder.parameters() if weight.requires_grad]
    others = [weight for part in (reader.audio_proj, reader.video_proj) for weight in part.parameters()]
    groups = [{"params": decoder, "lr": arguments.decoder_rate}, {"params": others, "lr": arguments.projector_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, min(50, arguments.steps // 10), arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done, best = arguments.out / "training.ckpt", 0, float("inf")
    if not kept.exists():
        for rate in arguments.video_rates:
            share = expect(reader, clean, rate, arguments.expect_steps)
            print(f"rate {rate}: lips explain {share:.1%} of the variance of clean sound states", flush=True)
    average = AveragedModel(reader, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    parts: dict[str, Any] = {"reader": reader, "average": average, "optimizer": optimizer, "schedule": schedule}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, best = state["step"], state["best"]

    chosen = random.Random(0).sample(range(len(dev)), min(DEV, len(dev)))
    looks = [collate([dev[i] for i in chosen[k : k + 16]]) for k in range(0, len(chosen), 16)]
    sampler = bucketed_batches(train.frames, int(25 * arguments.seconds), seed=0, bucket=20)
    sampler.start(0, done)
    stream = (keys for _ in iter(int, 1) for keys in sampler)
    seen: list[float] = []
    for step in range(done + 1, arguments.steps + 1):
        keys, rng = next(stream), random.Random(step)
        batch, heard = collate([train[key] for key in keys]), collate([clean[key[1] % len(clean)] for key in keys])
        assert batch.texts == heard.texts, "passes of different recordings"
        encoded, texts = encoded_of(batch), rows(whisper, batch.texts)
        assert encoded.audio is not None
        assert encoded.audio_lengths is not None
        hidden = hide_spans(encoded.audio, encoded.audio_lengths, arguments.hidden, rng)
        encoded = replace(encoded, audio=hidden)
        scales = rng.sample(reader.scales, min(arguments.scales_per_step, len(reader.scales)))
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            with torch.no_grad():
                expected = teacher(encoded_of(heard), texts[0], None)[texts[1] != IGNORED].float().log_softmax(-1)
            loss = torch.stack(list(losses(reader, encoded, texts, scales, whisper.end, expected))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(reader)
        seen.append(loss.item())
        if step % arguments.every == 0 or step == arguments.steps:
            found = development(average.module, looks, whisper)
            if sum(found) < best:
                best = sum(found)
                save_file(average.module.state_dict(), arguments.out / "taught.safetensors")
            save_run(kept, {name: part.state_dict() for name, part in parts.items()} | {"step": step, "best": best})
            names = map(str, reader.scales)
            line = json.dumps(
                {"step": step, "train": round(sum(seen) / len(seen), 4), "dev": dict(zip(names, found, strict=True))}
            )
            with (arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            seen = []


if __name__ == "__main__":
    main()
