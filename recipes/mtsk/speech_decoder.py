"""Teaches Whisper's decoder to read few tokens of sound, and of lips: `python speech_decoder.py WHISPER STATES OUT`.

A token of rate 16 holds a third of a second, about four phonemes; Whisper's decoder has looked at sound in steps of 20
ms. With adapters of queries and values alone rate 16 fell far behind rate 4. So projectors and cross-attention learn
together, in Whisper's own shape, where a step costs a fraction of one of the Llama that `speech_start.py --taught`
makes of the result. The rest of the decoder stays as it is, or, with `--rest-rate`, all but its embeddings learns. The
loss at each scale is the cross entropy of the text and, but for its end, the divergence from what Whisper expects when
it reads every state of the clean recording. A checkpoint is kept; a stopped run goes on. OUT gets

    taught.safetensors   decoder and projectors, averaged over the last steps, at the least development loss
    log.jsonl            what was minimized, and the cross entropy of a text token of development at each scale, of
                         clean sound, and where lips are read of lips alone

Each batch begins a random number of states later, so that a word is not always cut into the same tokens.

With `--video-rates` lips are read too, of shards and by the visual encoder of `rendered_lips.py` (`--lips`), whose
transformer learns along. A video token begins as the mean of the sound that the lips let one expect. Video states carry
positions, which those of sound have from Whisper's encoder. OUT then gets `avhubert.safetensors` too.
Steps of scales with lips are over what has some, every `--sound-every`-th is of sound alone, over all speech.

Not in Llama-MTSK (arXiv 2503.06362), whose language model is a pretrained Llama, and whose projectors start at
random.
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
from speech_start import FILES, Whisper, projector
from states import Seen, read_avhubert
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_linear_schedule_with_warmup

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.mtsk import Rates
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert
from tokenthrift.mtsk.config import scales_of
from tokenthrift.mtsk.external import AVHUBERT_FILE
from tokenthrift.mtsk.network import projectors
from tokenthrift.mtsk.sequence import IGNORED, Encoded
from tokenthrift.mtsk.training.clips import Batch, collate, open_passes
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.sources import fetch
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.training.sampler import endless_batches
from tokenthrift.whisper import sinusoids

DEV = 98  # recordings, as many as `speech.yaml` looks at
SOUND_FILE = "sound.safetensors"  # of rendered_lips.py


class Reader(nn.Module):
    """A decoder, and for each rate a projector of stacked states.

    Args:
        decoder: of Whisper's kind.
        audio_rates: states of sound per token; none for a reader of every state.
        video_rates: states of lips per token.
        hidden_size: between the two layers of a projector.
        visual: of what convolutions saw of lips, (B, T, 1, C), and of lengths (B,), to states (B, T, W).
    """

    def __init__(
        self,
        decoder: WhisperDecoder,
        audio_rates: Sequence[int] = (),
        video_rates: Sequence[int] = (),
        hidden_size: int = 1024,
        visual: AvHubert | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.rates = decoder, {"audio": tuple(audio_rates), "video": tuple(video_rates)}
        size = decoder.embed_tokens.embedding_dim
        self.audio_proj = nn.ModuleList(projector(rate, torch.eye(size), hidden_size) for rate in audio_rates)
        self.visual = visual
        width = 0 if visual is None else visual.post_extract_proj.out_features
        self.video_proj = projectors(video_rates, width, hidden_size, size, "stack", norm=False)
        tasks = ("asr", "avsr") if video_rates else ("asr",)
        self.scales = scales_of(tasks, *self.rates.values())

    def tokens(self, encoded: Encoded, modality: str, rate: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, D) of one modality, and how many each item has, (B,); as in `LlamaMtsk.tokens`."""
        states, lengths = getattr(encoded, modality), getattr(encoded, f"{modality}_lengths")
        if modality == "video":
            assert self.visual is not None
            states = self.visual(states[:, :, None], lengths)
            states = states + sinusoids(*states.shape[1:])
        stacked, counts = pool_by_rate(states, lengths, rate, "stack")
        return getattr(self, f"{modality}_proj")[self.rates[modality].index(rate)](stacked), counts

    def forward(self, encoded: Encoded, ids: Tensor, rates: Rates | None) -> Tensor:
        """Scores (B, L, V) of what follows each token (B, L) of texts; without rates, of every state of sound."""
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


def later(batch: Batch, states: int) -> Batch:
    """The batch with so many more states of what its recordings begin with, so that tokens of sound begin elsewhere."""
    if not states:
        return batch
    audio: Any = batch.audio
    lengths: Any = batch.audio_lengths
    moved = torch.cat([audio[:, :1].expand(-1, states, -1), audio], 1)
    return replace(batch, audio=moved, audio_lengths=lengths + states)


def rows(whisper: Whisper, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens that are read (B, L), and those that are to be written (B, L), `IGNORED` where there is none."""
    found = [whisper.ids(text) for text in texts]
    read = pad_rows([torch.tensor([*whisper.begin, *row]) for row in found])[0]
    return read, pad_rows([torch.tensor([IGNORED, *row, whisper.end]) for row in found], value=IGNORED)[0]


def losses(
    reader: Reader,
    batch: Batch,
    whisper: Whisper,
    scales: Sequence[Rates],
    expected: Tensor | None = None,
    muted: Tensor | None = None,
) -> Iterator[Tensor]:
    """The loss of a text token at each scale, with the divergence from what is expected, (tokens, V), if given.

    Where lips are read, sound of the `muted` items, (B,), is zero: with sound always there, lips are not learned.
    Of the end of a text nothing is to be learned from Whisper, which misses it where a recording ends without silence.
    """
    read, written = rows(whisper, batch.texts)
    targets = written[written != IGNORED]
    words, encoded = targets != whisper.end, encoded_of(batch)
    quiet = encoded
    if muted is not None and encoded.audio is not None:
        quiet = replace(encoded, audio=encoded.audio.masked_fill(muted[:, None, None], 0.0))
    for rates in scales:
        scores = reader(quiet if rates.video else encoded, read, rates)[written != IGNORED].float().log_softmax(-1)
        loss = F.nll_loss(scores, targets)
        if expected is not None:
            loss = loss + F.kl_div(scores[words], expected[words], log_target=True, reduction="batchmean")
        yield loss


@torch.no_grad()
def teacher_scores(teacher: Reader, batch: Batch, whisper: Whisper) -> Tensor:
    """(tokens, V) logarithms of the probabilities that a reader of every state gives."""
    read, written = rows(whisper, batch.texts)
    return teacher(encoded_of(batch), read, None)[written != IGNORED].float().log_softmax(-1)


@torch.no_grad()
def development(reader: Reader, batches: Sequence[Batch], whisper: Whisper) -> dict[str, float]:
    """The mean loss of a text token at each scale, of clean sound, and where lips are read of lips alone."""
    sums, count = torch.zeros(len(reader.scales)), 0
    for batch in batches:
        tokens = int((rows(whisper, batch.texts)[1] != IGNORED).sum())
        muted = torch.ones(len(batch.texts), dtype=torch.bool)
        sums += tokens * torch.stack(list(losses(reader, batch, whisper, reader.scales, muted=muted)))
        count += tokens
    return {str(rates): round(value, 4) for rates, value in zip(reader.scales, (sums / count).tolist(), strict=True)}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="an English Whisper, folder or Hub id")
    parser.add_argument("states", type=Path, help="`train` and `dev` of speech_states.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="taught.safetensors of another run, of the same sizes")
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--video-rates", type=int, nargs="*", default=[], help="of lips (default: none)")
    parser.add_argument("--lips", type=Path, help="OUT of rendered_lips.py, or of the run of --start")
    parser.add_argument("--mute", type=float, default=0.5, help="share of sound that is muted where lips are read")
    parser.add_argument("--sound-every", type=int, default=2, help="where lips are read, steps from one of sound alone")
    parser.add_argument("--scales-per-step", type=int, help="at random (default: all)")
    parser.add_argument("--vocabulary", type=int, default=16_000, help="most tokens to keep, as for speech_start.py")
    parser.add_argument("--projector", type=int, default=1024, help="between the two layers of a projector, likewise")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seconds", type=float, default=48, help="of speech in a step")
    parser.add_argument("--decoder-rate", type=float, default=2e-4, help="learning rate of the cross-attention")
    parser.add_argument("--rest-rate", type=float, default=0.0, help="of the rest of the decoder, which stays if 0")
    parser.add_argument("--projector-rate", type=float, default=4e-5, help="of projectors, whose sums are longer")
    parser.add_argument("--lips-rate", type=float, default=3e-4, help="of what reads lips, which knows less")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order, and of units of projectors that a mean leaves over"
    )
    parser.add_argument("--every", type=int, default=350, help="steps between looks at development recordings")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    whisper = Whisper(fetch(arguments.whisper, FILES), arguments.vocabulary)
    try:
        train, clean, dev = open_passes(arguments.states)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    teacher = Reader(copy.deepcopy(whisper.decoder)).requires_grad_(False)
    if (arguments.lips is None) == bool(arguments.video_rates):
        raise SystemExit("--video-rates and --lips, the folder of a visual encoder, go together")
    visual, convolutions = None, {}
    if arguments.lips is not None:
        if (video := train[0].video) is None:
            raise SystemExit(f"{arguments.states} has no lips: run rendered_lips.py")
        visual = read_avhubert(str(arguments.lips))
        if video.shape[1] != (width := visual.feature_extractor_video.proj.in_features):
            raise SystemExit(
                f"{arguments.states} has {video.shape[1]} numbers a frame, not {width}: run rendered_lips.py"
            )
        prefix = "feature_extractor_video.resnet."
        convolutions = {name: value for name, value in visual.state_dict().items() if name.startswith(prefix)}
        visual.feature_extractor_video.resnet = Seen()  # type: ignore[assignment]
    reader = Reader(whisper.decoder, arguments.rates, arguments.video_rates, arguments.projector, visual)
    given = {} if arguments.start is None else load_file(arguments.start)
    sees = any(name.startswith("video_proj.") for name in given)
    if sees and arguments.lips is not None and arguments.lips.resolve() != arguments.start.parent.resolve():
        raise SystemExit("--start has read lips by the visual encoder beside it: give its folder to --lips")
    if arguments.lips is not None and not sees:
        sound = load_file(arguments.lips / SOUND_FILE)
        for rate, project in zip(arguments.video_rates, reader.video_proj, strict=True):
            begun_as = projector(rate, sound["weight"], arguments.projector, sound["bias"])
            project.load_state_dict(begun_as.state_dict())
    if given:
        begins = ("visual.",) if sees else ("visual.", "video_proj.")
        own = {name: value for name, value in reader.state_dict().items() if name.startswith(begins)}
        reader.load_state_dict(own | given)
    cross: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    reader.requires_grad_(False)
    for name, weight in reader.decoder.named_parameters():
        if "embed" not in name:  # as Whisper has them
            (cross if "encoder_attn" in name else rest).append(weight)
    transformer = [] if visual is None else [*visual.parameters()]
    groups = [
        {"params": cross, "lr": arguments.decoder_rate},
        {"params": rest, "lr": arguments.rest_rate},
        {"params": [*reader.audio_proj.parameters()], "lr": arguments.projector_rate},
        {"params": [*reader.video_proj.parameters(), *transformer], "lr": arguments.lips_rate},
    ]
    groups = [group for group in groups if group["lr"]]
    for group in groups:
        for weight in group["params"]:
            weight.requires_grad_(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done, best = arguments.out / "training.ckpt", 0, float("inf")
    begun = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "steps", "every")}
    state: dict[str, Any] | None = torch.load(kept, weights_only=True) if kept.exists() else None
    if state is not None and state["begun"] != begun:
        raise SystemExit(f"{kept} was begun with {state['begun']}, not with {begun}; take another OUT")
    average = AveragedModel(reader, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, min(50, arguments.steps // 10), arguments.steps)
    parts: dict[str, Any] = {"reader": reader, "average": average, "optimizer": optimizer, "schedule": schedule}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, best = state["step"], state["best"]

    chosen = random.Random(0).sample(range(len(dev)), min(DEV, len(dev)))
    looks = [collate([dev[i] for i in chosen[k : k + 16]]) for k in range(0, len(chosen), 16)]
    kinds = [[rates for rates in reader.scales if not rates.video]]
    chosen_from: list[Sequence[int]] = [range(len(train))]
    if arguments.video_rates:
        kinds.append([rates for rates in reader.scales if rates.video])
        chosen_from.append([i for i, (_, spans) in enumerate(train.rows) if "video" in spans])
    frames, size = train.frames, int(25 * arguments.seconds)
    of_sound = done // arguments.sound_every
    begun_at = [done] if len(kinds) == 1 else [of_sound, done - of_sound]
    streams = [
        endless_batches([frames[i] for i in some], size, seed=arguments.seed, bucket=20, first=first)
        for some, first in zip(chosen_from, begun_at, strict=True)
    ]
    seen: list[float] = []
    for step in range(done + 1, arguments.steps + 1):
        kind = int(len(kinds) > 1 and step % arguments.sound_every > 0)
        numbers = [chosen_from[kind][i] for i in next(streams[kind])]
        batch = collate([train[i] for i in numbers])
        same = collate([clean[i % len(clean)] for i in numbers])
        rng, count = random.Random(step), arguments.scales_per_step or len(reader.scales)
        scales = rng.sample(kinds[kind], min(count, len(kinds[kind])))
        # Without it a word of a recording is always cut into tokens in the same way.
        batch = later(batch, rng.randrange(max(arguments.rates)))
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            expected = teacher_scores(teacher, same, whisper)
            muted = torch.tensor([rng.random() < arguments.mute for _ in batch.texts])
            loss = torch.stack(list(losses(reader, batch, whisper, scales, expected, muted))).mean()
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
                averaged = average.module.state_dict()
                taught = {name: value for name, value in averaged.items() if not name.startswith("visual.")}
                save_file(taught, arguments.out / "taught.safetensors")
                if visual is not None:
                    own = {k.removeprefix("visual."): v for k, v in averaged.items() if k not in taught}
                    save_file(convolutions | own, arguments.out / AVHUBERT_FILE)
            progress = {"step": step, "best": best, "begun": begun}
            save_run(kept, {name: part.state_dict() for name, part in parts.items()} | progress)
            line = json.dumps({"step": step, "train": round(sum(seen) / len(seen), 4), "dev": found})
            with (arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            seen = []


if __name__ == "__main__":
    main()
