"""Synthetic scenes and the questions about them: which shape appeared when, where it moved, and how many there were.

Made for this project; no published data. In a scene, two to five colored shapes and letters appear one after another
over a background and move or stay. Questions follow from the scene by rule, and each has one word as its answer. The
subject of a question is drawn before its answer is looked up, so the text of a question does not give the answer away.
`blind_accuracy` measures what can be guessed from the text alone; report it beside every accuracy.

Every table says that this data is synthetic. It tests whether tokens keep what happened in a clip; it does not test
what a model knows of the world.
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
    "make_questions",
    "blind_accuracy",
    "make_scene",
    "shape_words",
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
"""The vocabulary of questions and answers; the index of a word is its token id."""
_IDS: Final = {word: i for i, word in enumerate(WORDS)}


class Shape(NamedTuple):
    """One colored shape or letter of a scene.

    `start` and `stop` are centers (x, y) in pixels. The shape is visible in frames `enter` to `leave` - 1.
    """

    color: str
    name: str
    size: int
    direction: str
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
    """What happens in a clip: its shapes in the order in which they appear, its frames, and pixels of a side."""

    shapes: tuple[Shape, ...]
    num_frames: int
    image_size: int


class Question(NamedTuple):
    """A question, its one-word answer and what kind of question it is."""

    text: str
    answer: str
    kind: str


def shape_words(scene: Scene) -> list[list[int]]:
    """Words of every shape: its color, name, direction, order of appearance, and the corner where it ends."""
    return [
        [_IDS[word] for word in (shape.color, shape.name, shape.direction, _ORDINALS[i], _corner(shape, scene))]
        for i, shape in enumerate(scene.shapes)
    ]


def _corner(shape: Shape, scene: Scene) -> str:
    x, y = (at > scene.image_size / 2 for at in shape.stop)
    return _CORNERS[2 * y + x]


def encode_text(text: str) -> list[int]:
    """Token ids of a text whose words are in `WORDS`; the British "colour" is read as "color".

    Raises:
        ValueError: a word is not in `WORDS`; the message names the known ones.
    """
    words = text.replace(",", " , ").replace("?", " ? ").replace("colour", "color").split()
    if unknown := [word for word in words if word not in _IDS]:
        raise ValueError(f"unknown words {unknown}; the questions are made of: {' '.join(WORDS[1:])}")
    return [_IDS[word] for word in words]


def make_scene(rng: random.Random, num_frames: int = 8, image_size: int = 64) -> Scene:
    """A random scene of two to five shapes of different colors, which appear at different times and keep apart."""
    count = min(rng.randint(2, 5), max(num_frames - 3, 2))
    looks = [(color, rng.choice(SHAPES)) for color in rng.sample(COLORS, count)]
    enters = sorted(rng.sample(range(max(num_frames - 3, count)), count))
    shapes: list[Shape] = []
    for look, enter in zip(looks, enters, strict=True):
        leave = num_frames if rng.random() < 0.6 else rng.randint(min(enter + 4, num_frames), num_frames)
        tries = [_wander(rng, look, enter, leave, image_size) for _ in range(12)]
        # The try that keeps farthest from the others: a hidden shape would make questions without an answer.
        shapes.append(max(tries, key=lambda shape: _clearance(shape, shapes, num_frames)))
    return Scene(tuple(shapes), num_frames, image_size)


def _wander(rng: random.Random, look: tuple[str, str], enter: int, leave: int, image_size: int) -> Shape:
    size = rng.randint(image_size * 7 // 32, image_size * 10 // 32)
    low, high = size / 2, image_size - size / 2
    name = rng.choice(list(_STEPS))
    far = rng.uniform(0.5, 0.95) * (high - low)
    goes = [far * direction for direction in _STEPS[name]]
    start = [rng.uniform(max(low, low - go), min(high, high - go)) for go in goes]
    drift = [rng.uniform(-0.03, 0.03) * image_size if go == 0 and name != "still" else 0.0 for go in goes]
    stop = [min(max(a + go + d, low), high) for a, go, d in zip(start, goes, drift, strict=True)]
    return Shape(*look, size, name, (start[0], start[1]), (stop[0], stop[1]), enter, leave)


def _clearance(shape: Shape, others: Sequence[Shape], num_frames: int) -> float:
    gaps = [100.0]
    for other in others:
        for frame in range(num_frames):
            here, there = shape.at(frame), other.at(frame)
            if here and there:
                gap = max(abs(here[0] - there[0]), abs(here[1] - there[1])) - (shape.size + other.size) / 2
                gaps.append(min(gap, 0.0))
    return min(gaps)


def make_questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """`count` different questions, of kinds in turn."""
    kinds = list(_MAKERS)
    found: dict[str, Question] = {}
    for turn in range(20 * count):
        if turn % len(kinds) == 0:
            rng.shuffle(kinds)
        question = _MAKERS[kinds[turn % len(kinds)]](scene, rng)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"this scene has no {count} different questions, only {len(found)}")


def _name(shape: Shape, scene: Scene, rng: random.Random) -> str:
    """A description of a shape that fits no other shape of the scene."""
    ways = [f"the {shape.color} {shape.name}"]
    if sum(other.color == shape.color for other in scene.shapes) == 1:
        ways.append(f"the {shape.color} thing")
    return rng.choice(ways)


def _direction(scene: Scene, rng: random.Random) -> Question:
    shape = rng.choice(scene.shapes)
    return Question(f"which way did {_name(shape, scene, rng)} move ?", shape.direction, "direction")


def _mover(scene: Scene, rng: random.Random) -> Question | None:
    step = rng.choice(["left", "right", "up", "down"])
    movers = [shape for shape in scene.shapes if shape.direction == step]
    if len(movers) != 1:
        return None
    if rng.random() < 0.75:
        return Question(f"what color was the thing moved {step} ?", movers[0].color, "what moved")
    return Question(f"which shape moved {step} ?", movers[0].name, "what moved")


def _position(scene: Scene, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    offsets = [at - scene.image_size / 2 for at in shape.stop]
    if min(map(abs, offsets)) < 0.08 * scene.image_size:
        return None  # too near the middle for one of four corners
    return Question(f"where did {_name(shape, scene, rng)} end ?", _corner(shape, scene), "where to")


def _first(scene: Scene, rng: random.Random) -> Question | None:
    one, other = rng.sample(scene.shapes, 2)
    if one.color == other.color:
        return None
    answer = min(one, other, key=lambda shape: shape.enter).color
    names = f"the {one.color} {one.name} or the {other.color} {other.name}"
    return Question(f"which color came first , {names} ?", answer, "which first")


def _order(scene: Scene, rng: random.Random) -> Question | None:
    index = rng.randrange(len(_ORDINALS))
    if index >= len(scene.shapes):
        return None
    shape = scene.shapes[index]
    if rng.random() < 0.75:
        return Question(f"what color came {_ORDINALS[index]} ?", shape.color, "order")
    return Question(f"which shape came {_ORDINALS[index]} ?", shape.name, "order")


def _count(scene: Scene, rng: random.Random) -> Question:
    step = rng.choice(["left", "right", "up", "down"])
    tests: list[tuple[str, Callable[[Shape], bool]]] = [
        ("how many things were there ?", lambda shape: True),
        ("how many things moved ?", lambda shape: shape.direction != "still"),
        (f"how many things moved {step} ?", lambda shape: shape.direction == step),
    ]
    text, test = rng.choice(tests)
    return Question(text, _NUMBERS[sum(map(test, scene.shapes))], "how many")


def _look(scene: Scene, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        alone = sum(other.name == shape.name for other in scene.shapes) == 1
        return Question(f"what color was the {shape.name} ?", shape.color, "look") if alone else None
    alone = sum(other.color == shape.color for other in scene.shapes) == 1
    return Question(f"what shape was the {shape.color} thing ?", shape.name, "look") if alone else None


_MAKERS: Final[dict[str, Callable[[Scene, random.Random], Question | None]]] = {
    "direction": _direction,
    "what moved": _mover,
    "where to": _position,
    "which first": _first,
    "order": _order,
    "how many": _count,
    "look": _look,
}
KINDS: Final = tuple(_MAKERS)


def blind_accuracy(train: Sequence[Question], test: Sequence[Question]) -> tuple[float, float]:
    """How often one is right without seeing a clip.

    Args:
        train: questions with their answers.
        test: questions to answer.

    Returns:
        Share of right answers by the most frequent answer of the kind of question, and by the most frequent answer
        to that very text (of its kind where the text is new): the best that reading the question alone can do.
    """
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        kinds[question.kind][question.answer] += 1
        texts[question.text][question.answer] += 1
    majority = {kind: answers.most_common(1)[0][0] for kind, answers in kinds.items()}
    by_text = {text: answers.most_common(1)[0][0] for text, answers in texts.items()}
    guessed = [majority.get(q.kind) == q.answer for q in test]
    read = [by_text.get(q.text, majority.get(q.kind)) == q.answer for q in test]
    return sum(guessed) / len(test), sum(read) / len(test)
