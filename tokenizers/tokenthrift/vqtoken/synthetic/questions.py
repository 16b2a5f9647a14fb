"""Synthetic scenes and the questions about them: who came when, went where, and how many there were.

Made here, no published set: a scene is a handful of colored shapes and letters that appear one after another over a
background and move or stay; questions follow from the scene by rule and have one word as their answer. Nothing in a
question gives its answer away: what is asked about is drawn before it is known what is true of it. What the answers
of a text can be guessed from is measured by `blind_accuracy`, to be reported beside every accuracy.

Synthetic, and called so wherever a figure of it stands: it tests whether tokens keep what happened in a clip, not what
a model knows of the world.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "WORDS",
    "Question",
    "Scene",
    "Shape",
    "ask",
    "blind_accuracy",
    "make_scene",
    "names",
    "encode_text",
]

COLORS: Final = ("red", "green", "blue", "yellow", "magenta", "white")
SHAPES: Final = ("circle", "square", "triangle", "ring", "cross", "T", "H", "L")
_STEPS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five")
_ORDINALS: Final = ("first", "second", "third", "fourth", "fifth")
_CORNERS: Final = ("topleft", "topright", "bottomleft", "bottomright")
_TEXT: Final = (
    "? , the a or thing things what which way where how many color shape did was were there move moved came end"
)
WORDS: Final = ("<pad>", *COLORS, *SHAPES, *_STEPS, *_NUMBERS, *_ORDINALS, *_CORNERS, *_TEXT.split())
"""Every word of questions and answers; a word's place is its token."""
_IDS: Final = {word: i for i, word in enumerate(WORDS)}


class Shape(NamedTuple):
    """One shape of a scene. Places are centers in pixels; it is seen in frames `enter` to `leave` - 1."""

    color: str
    shape: str
    size: int
    step: str
    start: tuple[float, float]
    stop: tuple[float, float]
    enter: int
    leave: int

    def at(self, frame: int) -> tuple[float, float] | None:
        """Where its center (x, y) is, if it is there."""
        if not self.enter <= frame < self.leave:
            return None
        share = (frame - self.enter) / max(self.leave - 1 - self.enter, 1)
        (a, b), (c, d) = self.start, self.stop
        return a + share * (c - a), b + share * (d - b)


@dataclass(frozen=True, slots=True)
class Scene:
    """What happens in a clip: its things in the order of their coming, frames, and pixels of a side."""

    things: tuple[Shape, ...]
    frames: int
    side: int


class Question(NamedTuple):
    """A question, its one-word answer and what kind of question it is."""

    text: str
    answer: str
    kind: str


def names(scene: Scene) -> list[list[int]]:
    """Words of every thing: its color, its shape, the way it moves, its place among the comers, where it ends."""
    return [
        [_IDS[word] for word in (thing.color, thing.shape, thing.step, _ORDINALS[i], _corner(thing, scene))]
        for i, thing in enumerate(scene.things)
    ]


def _corner(thing: Shape, scene: Scene) -> str:
    x, y = (at > scene.side / 2 for at in thing.stop)
    return _CORNERS[2 * y + x]


def encode_text(text: str) -> list[int]:
    """Tokens of a text of known words.

    Raises:
        ValueError: a word is not in `WORDS`; the message names the known ones.
    """
    words = text.replace(",", " , ").replace("?", " ? ").split()
    if unknown := [word for word in words if word not in _IDS]:
        raise ValueError(f"unknown words {unknown}; the questions are made of: {' '.join(WORDS[1:])}")
    return [_IDS[word] for word in words]


def make_scene(rng: random.Random, frames: int = 8, side: int = 64) -> Scene:
    """Two to five things, each of a color of its own, coming at different times and keeping apart."""
    count = min(rng.randint(2, 5), max(frames - 3, 2))
    looks = [(color, rng.choice(SHAPES)) for color in rng.sample(COLORS, count)]
    enters = sorted(rng.sample(range(max(frames - 3, count)), count))
    things: list[Shape] = []
    for look, enter in zip(looks, enters, strict=True):
        leave = frames if rng.random() < 0.6 else rng.randint(min(enter + 4, frames), frames)
        tries = [_wander(rng, look, enter, leave, side) for _ in range(12)]
        # The try that keeps most apart from the others: hidden things would make questions without an answer.
        things.append(max(tries, key=lambda thing: _clearance(thing, things, frames)))
    return Scene(tuple(things), frames, side)


def _wander(rng: random.Random, look: tuple[str, str], enter: int, leave: int, side: int) -> Shape:
    size = rng.randint(side * 7 // 32, side * 10 // 32)
    low, high = size / 2, side - size / 2
    name = rng.choice(list(_STEPS))
    far = rng.uniform(0.5, 0.95) * (high - low)
    goes = [far * direction for direction in _STEPS[name]]
    start = [rng.uniform(max(low, low - go), min(high, high - go)) for go in goes]
    drift = [rng.uniform(-0.03, 0.03) * side if go == 0 and name != "still" else 0.0 for go in goes]
    stop = [min(max(a + go + d, low), high) for a, go, d in zip(start, goes, drift, strict=True)]
    return Shape(*look, size, name, (start[0], start[1]), (stop[0], stop[1]), enter, leave)


def _clearance(thing: Shape, others: Sequence[Shape], frames: int) -> float:
    gaps = [100.0]
    for other in others:
        for frame in range(frames):
            here, there = thing.at(frame), other.at(frame)
            if here and there:
                gap = max(abs(here[0] - there[0]), abs(here[1] - there[1])) - (thing.size + other.size) / 2
                gaps.append(min(gap, 0.0))
    return min(gaps)


def ask(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """`count` different questions, of kinds in turn."""
    kinds = list(_MAKERS)
    asked: dict[str, Question] = {}
    for turn in range(20 * count):
        if turn % len(kinds) == 0:
            rng.shuffle(kinds)
        question = _MAKERS[kinds[turn % len(kinds)]](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            return list(asked.values())
    raise ValueError(f"this scene has no {count} different questions, only {len(asked)}")


def _name(thing: Shape, scene: Scene, rng: random.Random) -> str:
    """A way to call a thing that fits no other."""
    ways = [f"the {thing.color} {thing.shape}"]
    if sum(other.color == thing.color for other in scene.things) == 1:
        ways.append(f"the {thing.color} thing")
    return rng.choice(ways)


def _direction(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    return Question(f"which way did {_name(thing, scene, rng)} move ?", thing.step, "direction")


def _mover(scene: Scene, rng: random.Random) -> Question | None:
    step = rng.choice(["left", "right", "up", "down"])
    movers = [thing for thing in scene.things if thing.step == step]
    if len(movers) != 1:
        return None
    if rng.random() < 0.75:
        return Question(f"what color was the thing moved {step} ?", movers[0].color, "what moved")
    return Question(f"which shape moved {step} ?", movers[0].shape, "what moved")


def _place(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    offsets = [at - scene.side / 2 for at in thing.stop]
    if min(map(abs, offsets)) < 0.08 * scene.side:
        return None  # too near the middle to say
    return Question(f"where did {_name(thing, scene, rng)} end ?", _corner(thing, scene), "where to")


def _first(scene: Scene, rng: random.Random) -> Question | None:
    one, other = rng.sample(scene.things, 2)
    if one.color == other.color:
        return None
    answer = min(one, other, key=lambda thing: thing.enter).color
    names = f"the {one.color} {one.shape} or the {other.color} {other.shape}"
    return Question(f"which color came first , {names} ?", answer, "which first")


def _order(scene: Scene, rng: random.Random) -> Question | None:
    place = rng.randrange(len(_ORDINALS))
    if place >= len(scene.things):
        return None
    thing = scene.things[place]
    if rng.random() < 0.75:
        return Question(f"what color came {_ORDINALS[place]} ?", thing.color, "order")
    return Question(f"which shape came {_ORDINALS[place]} ?", thing.shape, "order")


def _count(scene: Scene, rng: random.Random) -> Question:
    step = rng.choice(["left", "right", "up", "down"])
    tests: list[tuple[str, Callable[[Shape], bool]]] = [
        ("how many things were there ?", lambda thing: True),
        ("how many things moved ?", lambda thing: thing.step != "still"),
        (f"how many things moved {step} ?", lambda thing: thing.step == step),
    ]
    text, test = rng.choice(tests)
    return Question(text, _NUMBERS[sum(map(test, scene.things))], "how many")


def _look(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        alone = sum(other.shape == thing.shape for other in scene.things) == 1
        return Question(f"what color was the {thing.shape} ?", thing.color, "look") if alone else None
    alone = sum(other.color == thing.color for other in scene.things) == 1
    return Question(f"what shape was the {thing.color} thing ?", thing.shape, "look") if alone else None


_MAKERS: Final[dict[str, Callable[[Scene, random.Random], Question | None]]] = {
    "direction": _direction,
    "what moved": _mover,
    "where to": _place,
    "which first": _first,
    "order": _order,
    "how many": _count,
    "look": _look,
}
KINDS: Final = tuple(_MAKERS)


def blind_accuracy(known: Sequence[Question], asked: Sequence[Question]) -> tuple[float, float]:
    """How often one is right without seeing a clip.

    Args:
        known: questions whose answers may be learned by heart.
        asked: questions to answer.

    Returns:
        Share of right answers by the most frequent answer of the kind of question, and by the most frequent answer
        to that very text (of its kind where the text is new): the best that reading the question alone can do.
    """
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        kinds[question.kind][question.answer] += 1
        texts[question.text][question.answer] += 1
    majority = {kind: answers.most_common(1)[0][0] for kind, answers in kinds.items()}
    by_text = {text: answers.most_common(1)[0][0] for text, answers in texts.items()}
    guessed = [majority.get(q.kind) == q.answer for q in asked]
    read = [by_text.get(q.text, majority.get(q.kind)) == q.answer for q in asked]
    return sum(guessed) / len(asked), sum(read) / len(asked)
