"""When each word and phoneme of a recording is said: `python align.py MANIFEST OUT.jsonl --whisper CHECKPOINT`.

Real recordings come without the phoneme times that eSpeak gives with its own speech. They are found here as in
hidden-Markov training from a flat start (Young et al., The HTK Book, section 8.3): eSpeak NG says which phonemes a word
has, they are first spread evenly over what is not quiet, then a linear classifier of Whisper's encoder states (50 a
second) learns to name the phonemes and Viterbi's algorithm moves their borders to where it says, a few times over. A
pause may stand before each word and at the end. In place of a manifest a folder of shards of
`recipes/dllm_asr/synthesise.py` is taken too (each `--every`-th); a line then has `shard` in place of a file, and the
training clips of a shard come in their order. `OUT.jsonl` has the lines of the manifest with `words`
([start, end, word] in seconds) and `phonemes` ([start, name], `_` for a pause), paths relative to itself. Recordings of
more than 30 s are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from espeak import Voice, speak
from numpy.typing import NDArray
from speech_states import spoken
from states import AudioStates
from torch import Tensor, nn

from tokenthrift.media.audio import read_audio
from tokenthrift.whisper import MAX_STATES, states_of

PAUSE, STATES_PER_SECOND = "_", 50
NEAR, FAR = 8, 100.0  # frames around the spoken part in which there may be speech, and the penalty beyond
LOUD = 0.45  # of the way from the quietest to the loudest, in dB


class Spelled(NamedTuple):
    """The phonemes of a text with the pauses that may stand between words: names, and the word of each (-1: pause)."""

    names: list[str]
    words: list[int]


@cache
def pronounce(word: str, voice: str, letters: bool) -> tuple[str, ...]:
    """The phonemes of a word on its own.

    Args:
        word: lower case.
        voice: of eSpeak NG.
        letters: a word of one letter is its name, also "a".
    """
    if letters and len(word) == 1:
        word = {"a": "ay"}.get(word, word.upper())
    return tuple(name for _, name in speak(word, Voice(voice)).phonemes if name and not name.startswith(PAUSE))


def spell(text: str, voice: str, letters: bool) -> Spelled:
    """A pause, the phonemes of each word and a pause after it."""
    names, words = [PAUSE], [-1]
    for number, word in enumerate(text.split()):
        phonemes = pronounce(word, voice, letters)
        names += [*phonemes, PAUSE]
        words += [*[number] * len(phonemes), -1]
    return Spelled(names, words)


def spoken_part(samples: Tensor, frames: int) -> tuple[int, int]:
    """The first frame that is not quiet, and the one after the last."""
    hop = 16_000 // STATES_PER_SECOND
    power = F.pad(samples, (0, max(0, frames * hop - len(samples))))[: frames * hop].view(frames, hop).square().mean(1)
    # Of a tenth of a second; what is nearer to the quietest than to the loudest is a pause.
    level = 10 * F.avg_pool1d(power[None], 5, 1, 2, count_include_pad=False)[0].clamp_min(1e-10).log10()
    floor, peak = (float(level.quantile(q)) for q in (0.05, 0.95))
    loud = (level > floor + LOUD * (peak - floor)).nonzero()[:, 0]
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, frames)


def flat_start(part: tuple[int, int], frames: int, spelled: Spelled) -> NDArray[np.int64]:
    """(frames,) the position of each frame in the phonemes: evenly over the spoken part, pauses outside."""
    first, last = part
    spoken = [i for i, word in enumerate(spelled.words) if word >= 0]
    out = np.zeros(frames, dtype=np.int64)
    out[last:] = len(spelled.names) - 1
    places = np.arange(last - first) * len(spoken) // (last - first)
    out[first:last] = np.array(spoken)[places]
    return out


def viterbi(scores: NDArray[np.float32], words: Sequence[int]) -> NDArray[np.int64]:
    """The best path through positions in order; a position without a word may be left out.

    Args:
        scores: (frames, positions) log likelihoods.
        words: of each position, -1 for a pause.

    Returns:
        (frames,) positions, each equal to the one before, the next, or the next but a pause.
    """
    frames, size = scores.shape
    jumps = np.array([i >= 2 and words[i - 1] < 0 for i in range(size)])
    best = np.full(size, -np.inf)
    best[0] = scores[0, 0]
    if size > 1 and words[0] < 0:
        best[1] = scores[0, 1]
    steps = np.zeros((frames, size), dtype=np.int8)
    for t in range(1, frames):
        before = np.full((3, size), -np.inf)
        before[0] = best
        before[1, 1:] = best[:-1]
        before[2, 2:] = np.where(jumps[2:], best[:-2], -np.inf)
        steps[t] = before.argmax(0)
        best = before.max(0) + scores[t]
    place = size - 1 if size == 1 or words[-1] >= 0 or best[-1] >= best[-2] else size - 2
    path = np.empty(frames, dtype=np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = place
        place -= int(steps[t, place])
    return path


def fit(states: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier of frames, after three passes or 150 steps."""
    torch.manual_seed(0)
    model = nn.Linear(states.shape[1], classes)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(max(3, 150 * 512 // len(states))):
        for rows in torch.randperm(len(states)).split(512):
            loss = F.cross_entropy(model(states[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def align(
    states: Sequence[Tensor], sounds: Sequence[Tensor], spelled: Sequence[Spelled], rounds: int = 6
) -> list[NDArray[np.int64]]:
    """The position of each frame of each recording in its phonemes.

    Args:
        states: (frames, D) of each recording.
        sounds: (samples,) of each, for the flat start.
        spelled: the phonemes of each.
        rounds: of learning and moving the borders.
    """
    inventory = {name: i for i, name in enumerate(sorted({name for one in spelled for name in one.names}))}
    ids = [np.array([inventory[name] for name in one.names]) for one in spelled]
    every = F.layer_norm(torch.cat([row.float() for row in states]), states[0].shape[1:])
    spans = [spoken_part(sound, len(row)) for sound, row in zip(sounds, states, strict=True)]
    paths = [flat_start(span, len(row), one) for span, row, one in zip(spans, states, spelled, strict=True)]
    for _ in range(rounds):
        labels = torch.from_numpy(np.concatenate([own[path] for own, path in zip(ids, paths, strict=True)]))
        model = fit(every, labels, len(inventory))
        prior = (labels.bincount(minlength=len(inventory)) + 1.0).log()
        with torch.inference_mode():
            likelihoods = (model(every).log_softmax(1) - prior).split([len(row) for row in states])
        paths = []
        for rows, own, one, (first, last) in zip(likelihoods, ids, spelled, spans, strict=True):
            scores = rows[:, torch.from_numpy(own)].numpy()
            # Or the phonemes at the ends would learn the quiet around them.
            said = np.array(one.words) >= 0
            scores[: max(0, first - NEAR), said] -= FAR
            scores[last + NEAR :, said] -= FAR
            paths.append(viterbi(scores, one.words))
    return paths


def times(path: NDArray[np.int64], spelled: Spelled, text: str) -> dict[str, list[list[float | str]]]:
    """`words` and `phonemes` of a path."""
    phonemes: list[list[float | str]] = []
    starts: dict[int, list[int]] = {}
    for t, place in enumerate(path.tolist()):
        if t == 0 or place != path[t - 1]:
            phonemes.append([round(t / STATES_PER_SECOND, 2), spelled.names[place]])
        if (word := spelled.words[place]) >= 0:
            starts.setdefault(word, [t, t])[1] = t + 1
    names = text.split()
    words: list[list[float | str]] = [
        [round(a / STATES_PER_SECOND, 2), round(b / STATES_PER_SECOND, 2), names[i]] for i, (a, b) in starts.items()
    ]
    return {"words": words, "phonemes": phonemes}


def of_shard(shard: Path) -> list[tuple[dict[str, Any], Tensor]]:
    """The training clips of a shard of synthetic speech, as lines of a manifest, and their sound; twenty faces each."""
    return [
        (
            {"shard": shard.stem, "text": text, "speaker": f"{shard.stem} {i % 20}", "duration": len(sound) / 16_000},
            sound,
        )
        for i, (sound, text) in enumerate(spoken(shard))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="or a folder of shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--whisper", default="openai/whisper-tiny.en")
    parser.add_argument("--voice", default="en-gb-x-rp", help="of eSpeak NG, for the pronunciation")
    parser.add_argument("--every", type=int, default=1, help="of the shards of a folder, this many-th")
    parser.add_argument("--letters", action="store_true", help="words of one letter are names of letters, as in GRID")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    home = arguments.manifest.parent
    if arguments.every != 1 and not arguments.manifest.is_dir():
        parser.error("--every is of the shards of a folder")
    if arguments.manifest.is_dir():
        read = [
            pair for shard in sorted(arguments.manifest.glob("*.npz"))[:: arguments.every] for pair in of_shard(shard)
        ]
    else:
        rows = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines()]
        read = [(row, read_audio(home / row["audio_filepath"])) for row in rows]
    if not read:
        parser.error(f"{arguments.manifest} has no recordings")
    count = len(read)
    read = [(row, sound) for row, sound in read if states_of(len(sound)) <= MAX_STATES]
    left_out = count - len(read)
    rows, sounds = [row for row, _ in read], [sound for _, sound in read]
    spelled = [spell(row["text"], arguments.voice, arguments.letters) for row in rows]
    paths = align(AudioStates(arguments.whisper).encode(sounds), sounds, spelled)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        for row, path, one in zip(rows, paths, spelled, strict=True):
            for name in ("audio_filepath", "video_filepath"):
                if row.get(name):
                    row[name] = os.path.relpath((home / row[name]).resolve(), arguments.out.parent.resolve())
            file.write(json.dumps(row | times(path, one, row["text"])) + "\n")
    print(f"{len(rows)} recordings" + (f", {left_out} longer than 30 s left out" if left_out else ""))


if __name__ == "__main__":
    main()
