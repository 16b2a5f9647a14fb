"""What the lips do for each phoneme: the viseme map, mouth shapes, and co-articulation.

Fifteen visemes of MPEG-4 (ISO/IEC 14496-2, FAP 1), 0 being silence; the phonemes are eSpeak NG's English ones. All
phonemes of a viseme look the same, so the map says exactly what lip reading cannot tell apart (`homophene_bound`). The
mouth moves between the shapes by dominance functions (Cohen and Massaro 1993): at each instant a mean of all shapes,
weighted by a falling exponential of the distance to each phoneme's center. Shapes and weights are our choice, no
standard gives them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

FPS = 25
# Names are tried as they are, then without the marks of eSpeak's allophones. Two visemes: the mouth glides.
_MAP: dict[tuple[int, ...], str] = {
    (1,): "p b m",
    (2,): "f v",
    (3,): "T D",
    (4,): "t d t# t[ *",
    (5,): "k g N x",
    (6,): "tS dZ S Z",
    (7,): "s z",
    (8,): "l n @L n-",
    (9,): "r 3 3: VR r- @r r/",
    (10,): "A: A@ A a a# aa V @ @2 0 I2a",
    (11,): "E e e: e@ E2",
    (12,): "I I2 i i: j i@ i@3 I# ;",
    (13,): "O O: O@ o@ o o: 02 O2",
    (14,): "U u: u w U@ W",
    (10, 12): "aI aI3 aI@",
    (10, 14): "aU aU@",
    (13, 12): "OI",
    (11, 12): "eI",
    (13, 14): "oU",
}
VISEMES = {name: visemes for visemes, names in _MAP.items() for name in names.split()}
SILENT = ("_", "?", "|")
# width, opening, rounding, upper lip raised, lower lip tucked under the teeth, teeth, tongue, jaw
PARAMETERS = ("width", "opening", "rounding", "raise", "tuck", "teeth", "tongue", "jaw")
SHAPES = np.array(
    [
        [0.50, 0.04, 0.00, 0.00, 0.0, 0.0, 0.0, 0.00],  # silence
        [0.50, 0.00, 0.00, 0.00, 0.0, 0.0, 0.0, 0.00],  # p b m
        [0.52, 0.12, 0.00, 0.25, 1.0, 0.9, 0.0, 0.10],  # f v
        [0.55, 0.26, 0.00, 0.10, 0.0, 0.5, 1.0, 0.20],  # T D
        [0.58, 0.22, 0.00, 0.00, 0.0, 0.6, 0.3, 0.15],  # t d
        [0.50, 0.36, 0.00, 0.00, 0.0, 0.2, 0.0, 0.35],  # k g
        [0.36, 0.28, 0.70, 0.40, 0.0, 0.9, 0.0, 0.15],  # tS S
        [0.64, 0.12, 0.00, 0.05, 0.0, 1.0, 0.0, 0.05],  # s z
        [0.54, 0.32, 0.00, 0.00, 0.0, 0.3, 0.7, 0.25],  # n l
        [0.38, 0.22, 0.45, 0.15, 0.0, 0.2, 0.2, 0.20],  # r
        [0.56, 0.90, 0.00, 0.10, 0.0, 0.4, 0.2, 0.90],  # a
        [0.66, 0.55, 0.00, 0.10, 0.0, 0.5, 0.2, 0.50],  # e
        [0.78, 0.26, 0.00, 0.05, 0.0, 0.7, 0.1, 0.15],  # i
        [0.38, 0.60, 0.60, 0.05, 0.0, 0.0, 0.1, 0.60],  # o
        [0.20, 0.20, 1.00, 0.00, 0.0, 0.0, 0.0, 0.15],  # u
    ]
)
DOMINANCE = np.array([0.5, 4.0, 3.0, 1.2, 0.8, 0.6, 1.6, 1.0, 0.8, 1.0, 1.2, 1.2, 1.2, 1.5, 2.2])
SPREAD = 0.045  # seconds in which dominance falls by a factor of e


def visemes_of(name: str) -> tuple[int, ...]:
    """Visemes of one eSpeak phoneme, in order; an unknown name raises KeyError."""
    if not name or name.startswith(SILENT):
        return (0,)
    if name == "h":
        return ()  # the mouth is already in the next vowel
    for form in (name, name.rstrip("#-23@:"), name[:2], name[:1]):
        if form in VISEMES:
            return VISEMES[form]
    raise KeyError(f"no viseme for the phoneme {name!r}")


def targets(phonemes: Sequence[tuple[float, str]], end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres in seconds, half durations and visemes of the mouth's targets.

    Args:
        phonemes: (start in seconds, name), in order.
        end: where the last one ends.
    """
    rows = []
    for (start, name), stop in zip(phonemes, [*(s for s, _ in phonemes[1:]), end], strict=True):
        shapes = visemes_of(name)
        half = max(stop - start, 0.01) / 2 / max(1, len(shapes))
        rows += [(start + half * (2 * i + 1), half, shape) for i, shape in enumerate(shapes)]
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2].astype(np.int64)


def mouth_track(phonemes: Sequence[tuple[float, str]], seconds: float, lead: float = 0.06) -> np.ndarray:
    """`(frames, 8)` mouth parameters at 25 frames a second.

    Args:
        phonemes: (start in seconds, name), in order.
        seconds: length of the sound; the last frame may be cut short.
        lead: seconds by which the lips are ahead of the sound.
    """
    frames = max(1, round(seconds * FPS))
    centers, halves, shapes = targets([(0.0, "_"), *phonemes], seconds)
    time = np.arange(frames)[:, None] / FPS + lead
    distance = np.maximum(np.abs(time - centers) - 0.5 * halves, 0)
    weight = DOMINANCE[shapes] * np.exp(-distance / SPREAD) * np.minimum(halves / 0.03, 2.0)
    track = weight @ SHAPES[shapes] / np.maximum(weight.sum(1, keepdims=True), 1e-9)
    closed = shapes == 1  # lips that are nearly closed are open: force the closure
    if closed.any():
        width = np.maximum(halves[closed], 0.035)
        track[:, 1] *= (1 - np.exp(-(((time - centers[closed]) / width) ** 2))).min(1)
    return track


def viseme_string(names: Iterable[str]) -> tuple[int, ...]:
    """What is to be seen of a phoneme string: its visemes without silence and without immediate repetition."""
    out: list[int] = []
    for name in names:
        out += [v for v in visemes_of(name) if v and (not out or out[-1] != v)]
    return tuple(out)


def frame_visemes(phonemes: Sequence[tuple[float, str]], seconds: float, lead: float = 0.06) -> np.ndarray:
    """`(frames,)` the viseme whose target is nearest to each frame: what a visual encoder can be taught."""
    frames = max(1, round(seconds * FPS))
    centers, halves, shapes = targets([(0.0, "_"), *phonemes], seconds)
    time = np.arange(frames)[:, None] / FPS + lead
    return shapes[np.argmin(np.abs(time - centers) - halves, axis=1)]


def homophene_bound(words: Sequence[tuple[str, tuple[int, ...]]]) -> float:
    """The lowest word error rate of a perfect lip reader who knows how often each word occurs.

    Of all words that look alike only the most frequent can be right; context and the length of sounds are not used.

    Args:
        words: (word, viseme string) of every running word.
    """
    looks: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
    for word, shape in words:
        looks[shape][word] += 1
    right = sum(max(counts.values()) for counts in looks.values())
    return 1 - right / max(1, len(words))
