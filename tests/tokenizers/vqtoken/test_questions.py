"""Scenes and questions: every answer is true of the scene, and nothing in a text gives it away."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.vqtoken.synthetic.data import SyntheticClips
from tokenthrift.vqtoken.synthetic.questions import (
    COLORS,
    KINDS,
    SHAPES,
    WORDS,
    Question,
    Scene,
    Shape,
    blind_accuracy,
    encode_text,
    make_questions,
    make_scene,
)
from tokenthrift.vqtoken.synthetic.scenes import draw, patch_labels, read_backgrounds, texture, window

FEW = settings(deadline=None, max_examples=40)
SCENES = st.integers(0, 10_000).map(lambda seed: make_scene(random.Random(seed)))
KNOWN = Scene(
    (
        Shape("red", "circle", 16, "right", (10, 20), (50, 20), 0, 8),
        Shape("blue", "T", 16, "still", (20, 50), (20, 50), 2, 8),
        Shape("green", "ring", 16, "still", (50, 54), (50, 54), 3, 8),
    ),
    8,
    64,
)


@FEW
@given(scene=SCENES)
def test_things_are_told_apart_stay_inside_and_come_at_different_times(scene: Scene) -> None:
    assert 2 <= len(scene.shapes) <= 5
    assert len({shape.color for shape in scene.shapes}) == len(scene.shapes)
    enters = [shape.enter for shape in scene.shapes]
    assert enters == sorted(set(enters))
    for shape in scene.shapes:
        assert 0 <= shape.enter < shape.leave <= scene.num_frames
        for frame in range(scene.num_frames):
            at = shape.at(frame)
            assert (at is not None) == (shape.enter <= frame < shape.leave)
            if at is not None:
                assert all(shape.size / 2 - 1e-6 <= place <= scene.image_size - shape.size / 2 + 1e-6 for place in at)


@FEW
@given(scene=SCENES)
def test_a_thing_moves_the_way_its_story_says(scene: Scene) -> None:
    for shape in scene.shapes:
        dx, dy = (b - a for a, b in zip(shape.start, shape.stop, strict=True))
        way = {"left": -dx, "right": dx, "up": -dy, "down": dy, "still": 0.0}[shape.direction]
        assert (dx, dy) == (0, 0) if shape.direction == "still" else way > 3 * min(abs(dx), abs(dy)) >= 0


def test_answers_of_a_known_scene() -> None:
    answers = {q.text: q.answer for seed in range(60) for q in make_questions(KNOWN, random.Random(seed), 8)}
    expected = {
        "which way did the red circle move ?": "right",
        "which way did the blue thing move ?": "still",
        "what color was the thing moved right ?": "red",
        "which shape moved right ?": "circle",
        "where did the green ring end ?": "bottomright",
        "where did the blue thing end ?": "bottomleft",
        "which color came first , the blue T or the red circle ?": "red",
        "which color came first , the green ring or the blue T ?": "blue",
        "what color came third ?": "green",
        "which shape came second ?": "T",
        "how many things were there ?": "three",
        "how many things moved ?": "one",
        "how many things moved left ?": "zero",
        "what color was the ring ?": "green",
        "what shape was the blue thing ?": "T",
    }
    assert {text: answers.get(text) for text in expected} == expected
    assert not any("moved left" in text and "how many" not in text for text in answers), "nothing moved left"


@FEW
@given(scene=SCENES, seed=st.integers(0, 99))
def test_questions_differ_are_answered_by_one_word_and_can_be_encoded(scene: Scene, seed: int) -> None:
    found = make_questions(scene, random.Random(seed), 6)
    assert len({q.text for q in found}) == 6
    for question in found:
        assert [WORDS[i] for i in encode_text(question.text)] == question.text.split()
        assert len(encode_text(question.answer)) == 1
        assert question.kind in KINDS


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown words \['purple'\].*magenta"):
        encode_text("what shape was the purple thing?")


def test_more_questions_than_a_story_has() -> None:
    with pytest.raises(ValueError, match="no 500 different questions"):
        make_questions(KNOWN, random.Random(0), 500)


def test_reading_the_question_alone_does_not_answer_it() -> None:
    rng = random.Random(0)
    questions = [q for _ in range(1500) for q in make_questions(make_scene(rng), rng, 6)]
    majority, text = blind_accuracy(questions[:6000], questions[6000:])
    assert majority < 0.3
    assert text < 0.4


def test_blind_accuracy_of_what_is_known_by_heart() -> None:
    known = [Question("a ?", "red", "k"), Question("a ?", "red", "k"), Question("b ?", "blue", "k")]
    assert blind_accuracy(known, known) == (2 / 3, 1.0)
    assert blind_accuracy(known, [Question("c ?", "red", "k")]) == (1.0, 1.0)


def test_frames_show_the_story_and_labels_name_it() -> None:
    background = texture(random.Random(0), 8, 64)
    before = background.copy()
    clip, labels = draw(KNOWN, background), patch_labels(KNOWN, 8)
    assert np.array_equal(background, before)
    assert tuple(clip[0, 20, 10]) == (225, 35, 35)
    assert tuple(clip[7, 20, 50]) == (225, 35, 35)
    assert np.array_equal(clip[1, 40:], background[1, 40:]), "nothing is there yet"
    assert labels.shape == (8, 8, 8, 3)
    assert tuple(labels[0, 2, 1]) == (1 + COLORS.index("red"), 1 + SHAPES.index("circle"), 1)
    assert tuple(labels[7, 6, 6]) == (1 + COLORS.index("green"), 1 + SHAPES.index("ring"), 3)
    assert not labels[0, 5:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_look_different(shape: str) -> None:
    def seen(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        one = Shape("red", name, 18, "still", (32, 32), (32, 32), 0, 1)
        return draw(Scene((one,), 1, 64), np.zeros((1, 64, 64, 3), np.uint8))

    assert all((seen(shape) != seen(other)).any(-1).mean() > 0.004 for other in SHAPES if other != shape)


def test_the_same_number_is_the_same_clip_and_parts_share_none() -> None:
    clips = {part: SyntheticClips(part, 5, questions_per_clip=4) for part in ("train", "dev", "test")}
    again = SyntheticClips("train", 5, questions_per_clip=4)
    for number in (3, 0):
        assert np.array_equal(again[number].frames, clips["train"][number].frames)
        assert again[number].questions == clips["train"][number].questions
    scenes = [clips[part][number].scene for part in clips for number in range(5)]
    assert len(set(scenes)) == 15
    assert SyntheticClips("train", 5, seed=1, questions_per_clip=4)[0].scene not in scenes


def test_backgrounds_are_windows_of_whole_clips() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (20, 30, 40, 3), dtype=np.uint8)
    assert window([clip], random.Random(0), 8, 16).shape == (8, 16, 16, 3)
    with pytest.raises(ValueError, match="too small"):
        window([clip], random.Random(0), 8, 64)
    with pytest.raises(ValueError, match="too small"):
        window([clip], random.Random(0), 21, 16)


def test_folders_of_backgrounds(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("backgrounds")
    with pytest.raises(FileNotFoundError, match=r"backgrounds\.py"):
        read_backgrounds(folder)
    np.save(folder / "a.npy", np.zeros((9, 20, 20, 3), np.uint8))
    assert read_backgrounds(folder)[0].shape == (9, 20, 20, 3)
    np.save(folder / "b.npy", np.zeros((9, 20, 20), np.uint8))
    with pytest.raises(ValueError, match=r"b\.npy"):
        read_backgrounds(folder)
