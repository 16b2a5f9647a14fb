"""Lips for a model of real speech: `python lips_start.py MODEL STATES AVHUBERT OUT`.

MODEL hears and has no eyes (`speech.yaml`). OUT is the same model with projectors for video besides, from which
`lips.yaml` goes on. Its language model knows what a sound token is and has never seen a lip, so a video token begins as
the sound token that the lips let one expect: the projectors learn to give the mean of the states of clean sound over
the time of a token. Video states carry positions, as this language model counts none of sound and video.

STATES are those of `speech_states.py --avhubert`, of which the clean pass is read; AVHUBERT is the visual encoder that
made them.

Not in Llama-MTSK (arXiv 2503.06362), whose projectors start at random.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from speech_decoder import CLEAN
from torch import Tensor, nn
from whisper_llama import BALLAST, EXTRA

from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.mtsk.audiovisual.avhubert import avhubert_config
from tokenthrift.mtsk.external import AVHUBERT_FILE
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.clips import CachedStates
from tokenthrift.mtsk.training.start import Origin, carried_over
from tokenthrift.padding import pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.sources import fetch

BATCH = 32  # recordings


def with_lips(source: str, avhubert: str, rates: tuple[int, ...]) -> LlamaMtsk:
    """A model of sound as one of sound alone and of both; its video projectors are random."""
    heard = LlamaMtsk.from_pretrained(source)
    weights = load_file(fetch(avhubert, (AVHUBERT_FILE,)) / AVHUBERT_FILE)
    video = replace(avhubert_config(weights), positions=True)
    config = replace(heard.config, video=video, video_rates=rates, tasks=("asr", "avsr"), table=())
    model = LlamaMtsk(config, heard.tokenizer)
    model.load_state_dict(carried_over(model, heard.state_dict(), Origin.of(heard.config)))
    assert model.video_encoder is not None
    model.video_encoder.load_state_dict(weights)
    return model


def batches(data: CachedStates, steps: int, seed: int = 0) -> Iterator[Encoded]:
    """Random recordings with sound and lips."""
    rng = random.Random(seed)
    for _ in range(steps):
        clips = [data[i] for i in rng.sample(range(len(data)), min(BATCH, len(data)))]
        streams: dict[str, Tensor] = {}
        for name in ("audio", "video"):
            padded, mask = pad_rows([getattr(clip, name).float() for clip in clips])
            streams |= {name: padded, f"{name}_lengths": mask.sum(1)}
        yield Encoded(**streams)


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


def expect(model: LlamaMtsk, data: CachedStates, rate: int, steps: int, learning_rate: float = 1e-3) -> float:
    """Trains the projector of a video rate on what sound is expected; returns the variance explained at the end."""
    project = model.video_proj[model.config.video_rates.index(rate)]
    outer, size = project[-1], model.config.language_model.hidden_size - EXTRA
    assert isinstance(outer, nn.Linear)
    with torch.no_grad():
        outer.weight[size:] = 0.0
        outer.bias[size:] = torch.tensor([BALLAST, *[0.0] * (EXTRA - 1)])
    optimizer = torch.optim.Adam(project.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    explained: list[float] = []
    for encoded in batches(data, steps):
        tokens, counts = model.tokens(encoded, "video", rate)
        target, there = expected_sound(encoded, rate, tokens.shape[1])
        there &= torch.arange(tokens.shape[1]) < counts[:, None]
        loss = F.mse_loss(tokens[..., :size][there], target[there])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        explained.append(1 - loss.item() / float(target[there].var(0, unbiased=False).mean()))
    return sum(explained[-20:]) / len(explained[-20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("states", type=Path, help="the folder `train` of speech_states.py --avhubert")
    parser.add_argument("avhubert", help="folder or Hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = with_lips(arguments.model, arguments.avhubert, tuple(arguments.rates))
    data = CachedStates(sorted(arguments.states.glob(CLEAN)))
    for rate in arguments.rates:
        share = expect(model, data, rate, arguments.steps)
        print(f"rate {rate}: lips explain {share:.1%} of the variance of clean sound states", flush=True)
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
