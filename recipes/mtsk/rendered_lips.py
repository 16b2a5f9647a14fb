"""A visual encoder for rendered mouths, and what it sees: `python rendered_lips.py ALIGNED.jsonl STATES OUT`.

`ALIGNED.jsonl` is a manifest of real recordings by `align.py`, STATES what `speech_states.py` made of it. The mouth of
`mouth.py` says each recording (`rendered.py`), and the encoder learns to name the viseme of every frame and what sound
to expect with it: the mean of Whisper's states of the clean recording over the frame. So a token of lips can begin as
one of sound, as in Lip2Vec (Djilali et al. 2023, arXiv 2308.06112), which maps lips to the latents of a recognizer of
sound. First all of it learns, on pictures that are drawn as they are needed, with crops and masks that change. Then its
convolutions stay, what they see of each recording is kept, and the transformer goes on, a third of the cost.

    OUT/avhubert.safetensors   the encoder, key names of the public checkpoints; synthetic mouths only, and named so
    OUT/sound.safetensors      what sound to expect: `weight` (D, W) and `bias` (D,) of its states with positions
    STATES/*/*.safetensors     each shard of recordings gets `video`, what the convolutions see: the same in every pass,
                               noise moves no mouth. The transformer learns on in `speech_decoder.py`

With `--synthetic`, of `align.py` over shards of synthetic speech, these shards get lips too. With `--states-of`, the
OUT of `speech_decoder.py`, the states that this encoder makes of recordings go to its `states/`, for `lips.yaml`.

Checkpoints and what was seen are kept; a stopped run goes on, and writes `video` anew. Crops are averaged
over squares of 2 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lip_encoder import CROP, SHRINK, save_encoder, save_run
from mouth import face_of
from real_lips import with_fixed_slopes
from rendered import face_number, mouth
from safetensors.torch import save_file
from speech_decoder import SOUND_FILE, encoded_of
from speech_states import SHARD, rows_of
from states import Seen, read_avhubert, save_states
from torch import Tensor, nn
from visemes import FPS, SHAPES, frame_visemes

from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, normalize
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.augmentation import mask_video
from tokenthrift.mtsk.training.clips import CachedStates, collate
from tokenthrift.padding import pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.training.sampler import endless_batches
from tokenthrift.whisper import sinusoids

SIZE, MOVES = 92, 5  # pixels of the height and width that are drawn, and positions of a crop in them
FRAMES = 1200  # of a step: 48 s


def crop_of(row: dict[str, Any], rng: random.Random) -> Tensor:
    """(T, 88, 88) crops of a mouth that says an aligned recording, anywhere in the picture."""
    top, left = rng.randrange(MOVES), rng.randrange(MOVES)
    drawn = mouth(row, round(row["duration"] * 16_000), rng.getrandbits(30), SIZE)
    return drawn[:, top : top + CROP, left : left + CROP]


class Teacher(nn.Module):
    """The encoder, and linear readings of its states: the viseme of a frame, and the sound of its time.

    Args:
        width: of a state, a multiple of 64.
        layers: of the transformer.
        channels: of the convolutions.
        sound: width of a state of sound.
    """

    def __init__(self, width: int, layers: int, channels: Sequence[int], sound: int) -> None:
        super().__init__()
        self.encoder = with_fixed_slopes(AvHubert(width, layers, width // 64, 4 * width, channels))
        self.encoder.feature_extractor_audio.requires_grad_(False)
        self.visemes, self.sound = nn.Linear(width, len(SHAPES)), nn.Linear(width, sound)

    def forward(self, video: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of visemes (B, T, V), and sound (B, T, D) by the scale of `scale_of`."""
        states = self.encoder(video, lengths)
        # States of sound tell where they stand.
        return self.visemes(states), self.sound(states + sinusoids(*states.shape[1:]))


class Speakers:
    """The recordings of a split: their mouths, and what is to be learned of each.

    Args:
        manifest: of `align.py`.
        states: of `speech_states.py`, made of this manifest.
        split: of both.

    Raises:
        SystemExit: the two are not of the same recordings.
    """

    def __init__(self, manifest: Path, states: Path, split: str) -> None:
        rows = rows_of(manifest, split)
        self.rows = [row | {"speaker": row.get("speaker", number)} for number, row in enumerate(rows)]
        self.shards = sorted((states / split).glob("[0-9][0-9]-[0-9]*.safetensors"))
        self.clean = CachedStates([shard for shard in self.shards if shard.name.startswith("00-")])
        if [row["text"] for row in self.rows] != self.clean.texts:
            raise SystemExit(f"{states / split} has no pass 0 over all recordings of {manifest}: run speech_states.py")
        self.frames = [max(1, round(row["duration"] * FPS)) for row in self.rows]

    def visemes(self, index: int, frames: int) -> Tensor:
        """(T,) the viseme of each frame."""
        row = self.rows[index]
        lead = face_of(face_number(row, 0)).lead
        return torch.from_numpy(frame_visemes(row["phonemes"], row["duration"], lead))[:frames]


def expected_sound(encoded: Encoded, frames: int) -> tuple[Tensor, Tensor]:
    """(B, T, D) means of the states of sound over each of T frames, and (B, T) where there are any."""
    assert encoded.audio is not None
    assert encoded.audio_lengths is not None
    means, counts = pool_by_rate(encoded.audio, encoded.audio_lengths, 2)
    means = F.pad(means, (0, 0, 0, max(0, frames - means.shape[1])))[:, :frames]
    return means, torch.arange(frames) < counts[:, None]


def loss_of(
    model: Teacher,
    data: Speakers,
    chosen: Sequence[int],
    videos: Sequence[Tensor],
    scale: tuple[Tensor, Tensor],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what is right about it.

    Args:
        model: it learns.
        data: the recordings.
        chosen: numbers of some.
        videos: crops as the encoder reads them, or what its convolutions saw.
        scale: of sound, see `scale_of`.
    """
    lengths = torch.tensor([len(video) for video in videos])
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        scores, sound = (out.float() for out in model(pad_rows(list(videos))[0], lengths))
    named = pad_rows([data.visemes(i, len(video)) for i, video in zip(chosen, videos, strict=True)], value=-100)[0]
    target, there = expected_sound(encoded_of(collate([data.clean[i] for i in chosen])), scores.shape[1])
    there &= torch.arange(scores.shape[1]) < lengths[:, None]
    target = ((target - scale[0]) / scale[1])[there]
    error = (sound[there] - target).square().mean()
    varied = target.var(0, unbiased=False).mean()
    right = (scores.argmax(2)[named >= 0] == named[named >= 0]).float().mean()
    loss = F.cross_entropy(scores.flatten(0, 1), named.flatten()) + error
    return loss, {"frames right": right.item(), "sound explained": 1 - (error / varied).item()}


def scale_of(data: Speakers) -> tuple[Tensor, Tensor]:
    """(D,) mean and deviation of each channel of the states of clean sound, over a hundred recordings."""
    some = random.Random(0).sample(range(len(data.rows)), min(100, len(data.rows)))
    states = [data.clean[i].audio for i in some]
    every = torch.cat([state.float() for state in states if state is not None])
    return every.mean(0), every.std(0).clamp_min(1e-3)


def learn(
    model: Teacher,
    data: Speakers,
    videos: Callable[[int, random.Random], Tensor],
    kept: Path,
    steps: int,
    rate: float,
    begun: Mapping[str, str] | None = None,
    every: int = 50,
) -> None:
    """Trains what has gradients.

    Args:
        model: it learns.
        data: the recordings.
        videos: of the number of a recording and random numbers, what `Teacher` reads of it.
        kept: checkpoint, from which a stopped run goes on.
        steps: of 48 s of speech.
        rate: learning rate, after a warm-up of a tenth of the steps, before it falls.
        begun: options; a checkpoint of others is refused.
        every: steps between two checkpoints.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        if state["begun"] != dict(begun or {}):
            raise SystemExit(f"{kept} was begun with {state['begun']}, not with {begun}; take another OUT")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["step"]
    scale, stream = scale_of(data), endless_batches(data.frames, FRAMES, bucket=20, first=done)
    sums: dict[str, list[float]] = {}
    began = time.process_time()
    model.train()
    for step in range(done + 1, steps + 1):
        chosen, rng = next(stream), random.Random(step)
        loss, found = loss_of(model, data, chosen, [videos(i, rng) for i in chosen], scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        for name, value in {"loss": loss.item(), **found}.items():
            sums.setdefault(name, []).append(value)
        if step % every == 0 or step == steps:
            progress = {"step": step, "begun": dict(begun or {})}
            save_run(kept, {name: part.state_dict() for name, part in parts.items()} | progress)
            shown = [f"{name} {math.fsum(values) / len(values):.3f}" for name, values in sums.items()]
            print(f"step {step}:", *shown, f"{time.process_time() - began:.0f} s of CPU", sep=" | ", flush=True)
            sums = {}


@torch.inference_mode()
def look(model: Teacher, data: Speakers, folder: Path, name: str) -> CachedStates:
    """What the convolutions see of each recording, (T, 1, C) fp16, drawn once and kept in a file of their weights."""
    resnet = model.encoder.feature_extractor_video.resnet
    mark = zlib.crc32(b"".join(value.float().numpy().tobytes() for value in resnet.state_dict().values()))
    target = folder / f"seen-{name}-{mark:08x}.safetensors"
    if not target.exists():
        model.eval()
        seen = []
        for index in range(len(data.rows)):
            seen.append(view(resnet, data.rows[index], random.Random(index))[:, None])
        save_states(target, {"video": seen}, data.clean.texts)
    kept = CachedStates([target])
    if kept.texts != data.clean.texts:
        raise SystemExit(f"{target} is of other recordings; take another OUT")
    return kept


@torch.inference_mode()
def add_lips(data: Speakers, seen: CachedStates, encoder: AvHubert | None = None, folder: Path | None = None) -> None:
    """Gives each shard of recordings what was seen (T, C), or, in another folder, an encoder's states of it (T, W)."""
    video = []
    for index in range(len(data.rows)):
        frames: Any = seen[index].video
        if encoder is None:
            video.append(frames[:, 0])
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            video.append(encoder(frames.float()[None])[0].half())
    for shard in data.shards:
        first = SHARD * int(shard.stem.split("-")[1])
        target = shard if folder is None else folder / shard.name
        put(shard, video[first : first + SHARD], data.clean.texts[first : first + SHARD], target)


def put(shard: Path, video: list[Tensor], texts: Sequence[str], target: Path) -> None:
    """Writes a shard of states with a `video` of each clip, after a look whether it is of these texts."""
    kept = CachedStates([shard])
    if kept.texts != list(texts):
        raise SystemExit(f"{shard} is of other recordings")
    audio: Any = [kept[i].audio for i in range(len(kept))]
    target.parent.mkdir(parents=True, exist_ok=True)
    save_states(target, {"audio": audio, "video": video}, kept.texts, kept.trailing_silence or 0.0)


@torch.inference_mode()
def view(resnet: nn.Module, row: dict[str, Any], rng: random.Random) -> Tensor:
    """(T, C) fp16, what convolutions see of a mouth that says an aligned recording."""
    video = normalize(crop_of(row, rng), CROP, SHRINK)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        seen: Tensor = resnet(video, torch.ones(video.shape[:2], dtype=torch.bool))
    return seen.half()


def add_synthetic_lips(resnet: nn.Module, aligned: Path, states: Path) -> None:
    """Gives the shards of synthetic speech of an aligned manifest what the convolutions see, (T, C)."""
    rows = [json.loads(line) for line in aligned.read_text(encoding="utf-8").splitlines()]
    for name, lines in groupby(rows, key=lambda row: str(row["shard"])):
        shards = sorted((states / "train").glob(f"[0-9][0-9]-s{name}.safetensors"))
        if not shards:
            raise SystemExit(f"{states / 'train'} has no states of {name}: run speech_states.py with --synthetic")
        rng, said = random.Random(name), list(lines)
        video = [view(resnet, row, rng) for row in said]
        for shard in shards:
            put(shard, video, [row["text"] for row in said], shard)
        print(f"{name}: {len(said)} clips", flush=True)


@torch.inference_mode()
def development(model: Teacher, data: Speakers, seen: CachedStates, scale: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What is right about every fourth recording, a mean over recordings."""
    model.eval()
    found = []
    for index in range(0, len(data.rows), 4):
        frames: Any = seen[index].video
        found.append(loss_of(model, data, [index], [frames.float()], scale)[1])
    return {name: round(sum(one[name] for one in found) / len(found), 3) for name in found[0]}


def save_sound(model: Teacher, scale: tuple[Tensor, Tensor], folder: Path) -> None:
    """Writes `sound.safetensors` into a folder."""
    mean, deviation = scale
    weight = model.sound.weight.detach() * deviation[:, None]
    save_file({"weight": weight, "bias": model.sound.bias.detach() * deviation + mean}, folder / SOUND_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="of align.py, without --letters")
    parser.add_argument("states", type=Path, help="`train` and `dev` of speech_states.py, of this manifest")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=256, help="of the encoder's states, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of its transformer")
    parser.add_argument("--channels", type=int, nargs=4, default=[8, 16, 32, 64], help="of its convolutions")
    parser.add_argument("--steps", type=int, default=300, help="of the whole encoder")
    parser.add_argument("--rate", type=float, default=2e-3, help="its learning rate")
    parser.add_argument("--context-steps", type=int, default=1200, help="of the transformer alone")
    parser.add_argument("--context-rate", type=float, default=1e-3, help="its learning rate then")
    parser.add_argument("--synthetic", type=Path, help="aligned.jsonl of shards of synthetic speech")
    parser.add_argument("--states-of", type=Path, help="OUT of speech_decoder.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = json.loads((arguments.states / "settings.json").read_text(encoding="utf-8"))
    if settings["speeds"] != [1.0]:
        parser.error(f"lips move at one speed, and {arguments.states} was made with {settings['speeds']}")
    # Folders may move; whether they are of the same recordings is looked at apart.
    begun = {name: str(value) for name, value in vars(arguments).items() if isinstance(value, int | float | list)}
    train, dev = (Speakers(arguments.manifest, arguments.states, split) for split in ("train", "dev"))
    sound: Any = train.clean[0].audio
    model = Teacher(arguments.width, arguments.layers, arguments.channels, sound.shape[1])
    arguments.out.mkdir(parents=True, exist_ok=True)

    def drawn(index: int, rng: random.Random) -> Tensor:
        return normalize(mask_video(crop_of(train.rows[index], rng), rng, longest=5), CROP, SHRINK)

    learn(model, train, drawn, arguments.out / "training.ckpt", arguments.steps, arguments.rate, begun)
    sets = {"train": train, "dev": dev}
    seen = {name: look(model, data, arguments.out, name) for name, data in sets.items()}
    features = model.encoder.feature_extractor_video
    convolutions, features.resnet = features.resnet, Seen()  # type: ignore[assignment]

    def kept(index: int, rng: random.Random) -> Tensor:
        frames: Any = seen["train"][index].video
        return frames.float()

    learn(model, train, kept, arguments.out / "context.ckpt", arguments.context_steps, arguments.context_rate, begun)
    print("development:", development(model, dev, seen["dev"], scale_of(train)), flush=True)
    if arguments.states_of is not None:
        encoder = read_avhubert(str(arguments.states_of))
        own = encoder.feature_extractor_video.resnet.state_dict()
        if any(not torch.equal(own[name], value) for name, value in convolutions.state_dict().items()):
            raise SystemExit(f"{arguments.states_of} is of other convolutions than {arguments.out}")
        encoder.feature_extractor_video.resnet = Seen()  # type: ignore[assignment]
        for name, data in sets.items():
            add_lips(data, seen[name], encoder, arguments.states_of / "states" / name)
        return
    for name, data in sets.items():
        add_lips(data, seen[name])
    features.resnet = convolutions
    save_encoder(model.encoder, arguments.out)
    save_sound(model, scale_of(train), arguments.out)
    if arguments.synthetic is not None:
        add_synthetic_lips(convolutions.eval(), arguments.synthetic, arguments.states)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so not where tests import this
    main()
