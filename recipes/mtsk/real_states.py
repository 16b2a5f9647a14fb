"""Encoder states of real talking faces: `python real_states.py ALIGNED.jsonl OUT --avhubert FOLDER --noise DIR`.

As `states.py`, for clips that `align.py` has aligned. A pass goes once through the training clips. Half of them go on
as another clip of the same speaker from the border of a word on, in sound and picture alike, so that there are
sentences that nobody said. The sound gets a room by chance and noise at -5 to 20 dB or none; half of the noise is a
crowd (`crowd.py`). The pictures change as in `real_lips.py`, since the visual encoder has seen these clips. Development
clips stay as they are, but for noise at 0 dB on every second one. What is there is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from real_lips import CROP, SHRINK, Clips, change
from states import AudioStates, augmentation_of, options, read_avhubert, save_states
from torch import Tensor

from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, normalize
from tokenthrift.mtsk.audiovisual.noise import mix

SAMPLES = 640  # of a frame
FADE = 160


class Talkers(Clips):
    """Aligned clips with their sound."""

    def __init__(self, manifest: Path, split: str) -> None:
        super().__init__(manifest, None, None, split)
        self.sounds = [read_audio(manifest.parent / row["audio_filepath"]) for row in self.rows]

    def spliced(self, index: int, rng: random.Random) -> tuple[str, Tensor, Tensor]:
        """Text, samples and pictures of a clip, half the time with the end of another one."""
        texts = self.rows[index]["text"].split()
        sound, pictures = self.sounds[index], self.pictures[index]
        other = rng.randrange(len(self.rows))
        ends = self.rows[other]["text"].split()
        if rng.random() < 0.5 or len(ends) != len(texts) or self.speaker(other) != self.speaker(index):
            return " ".join(texts), sound, pictures
        cut = rng.randrange(1, len(texts))
        a, b = self.borders[index][cut], self.borders[other][cut]
        head, tail = sound[: a * SAMPLES].clone(), self.sounds[other][b * SAMPLES :].clone()
        ramp = torch.linspace(1, 0, FADE)
        head[-FADE:] *= ramp[-len(head) :] if len(head) < FADE else ramp
        tail[:FADE] *= ramp.flip(0)[: len(tail)]
        return (
            " ".join(texts[:cut] + ends[cut:]),
            torch.cat([head, tail]),
            torch.cat([pictures[:a], self.pictures[other][b:]]),
        )

    def speaker(self, index: int) -> str:
        """Who speaks, if the manifest says so."""
        return str(self.rows[index].get("speaker", ""))


@torch.inference_mode()
def encode(model: AvHubert, frames: Tensor) -> Tensor:
    """(T, D) fp16 states of frames (T, H, W) as the encoder reads them."""
    states: Tensor = model(frames[None])[0].half()
    return states


def main() -> None:
    parser = options(__doc__, "manifest")
    parser.add_argument("--crowd", type=Path, help="a crowd's noise, half of all noise")
    parser.add_argument("--passes", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    audio, lips = AudioStates(arguments.whisper), read_avhubert(arguments.avhubert)
    augmentation = augmentation_of(arguments.noise, arguments.crowd)
    for part in ("train", "dev"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    target = arguments.out / "dev" / "dev.safetensors"
    if not target.exists():
        dev, rng = Talkers(arguments.manifest, "dev"), random.Random(0)
        noises = [augmentation.noise(len(sound), rng) for sound in dev.sounds] if augmentation.noises else dev.sounds
        sounds = [mix(s, n, 0.0) if i % 2 else s for i, (s, n) in enumerate(zip(dev.sounds, noises, strict=True))]
        states = [encode(lips, normalize(pictures, CROP, SHRINK)) for pictures in dev.pictures]
        save_states(target, {"audio": audio.encode(sounds), "video": states}, [row["text"] for row in dev.rows])
    train: Talkers | None = None
    for number in range(arguments.passes):
        target = arguments.out / "train" / f"{number:02d}.safetensors"
        if target.exists():
            continue
        train = train or Talkers(arguments.manifest, "train")
        began, rng = time.process_time(), random.Random(number)
        texts, sounds, states = [], [], []
        for index in range(len(train.rows)):
            text, sound, pictures = train.spliced(index, rng)
            texts.append(text)
            sounds.append(augmentation.noisy(sound, rng))
            states.append(encode(lips, change(pictures, rng)))
        save_states(target, {"audio": audio.encode(sounds), "video": states}, texts)
        print(f"{target.name}: {len(texts)} clips, {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
