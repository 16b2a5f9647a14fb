"""Windows that overlap, joined: for any speech, any cut and an exact recognizer, the text of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenthrift.budget import TokenUsage
from tokenthrift.doubt import drop_doubtful
from tokenthrift.spoken_words import spoken_words
from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription.joining import join_overlaps
from tokenthrift.transcription.rereading import left_out
from tokenthrift.transcription.windows import plan_windows

RATE = 16_000
USAGE = TokenUsage(native=1, cap=1, used=1)
FEW = ("the", "of", "no", "zero")


def transcript(
    words: list[tuple[str, float, float]], *, confidence: float = 0.9, timed: bool = True, as_words: bool = False
) -> Transcript:
    tokens = tuple(
        TranscriptToken(f" {text}", confidence, start if timed else None, end if timed else None)
        for text, start, end in words
    )
    spoken = tuple(Word(text, start, end, confidence) for text, start, end in words) if as_words else ()
    return Transcript(" ".join(text for text, _, _ in words), tokens, USAGE, spoken)


def speech(count: int, seed: int, pause: float, repeated: float) -> list[tuple[str, float, float]]:
    """Words of 0.1 to 0.6 s, a share of them from a few; after a fifth of them a pause."""
    random = np.random.default_rng(seed)
    words, now = [], 1.0
    for index in range(count):
        text = str(random.choice(FEW)) if random.random() < repeated else f"w{index}"
        length = random.uniform(0.1, 0.6)
        words.append((text, now, now + length))
        now += length + (pause if random.random() < 0.2 else 0.0)
    return words


speeches = st.builds(
    speech,
    st.integers(1, 160),
    st.integers(0, 2**32 - 1),
    pause=st.sampled_from([0.0, 0.05, 0.3, 3.0]),
    repeated=st.sampled_from([0.0, 0.3, 0.8]),
)


@settings(deadline=None, max_examples=120)
@given(
    words=speeches,
    longest=st.sampled_from([8.0, 15.0, 30.0]),
    jitter=st.sampled_from([0.0, 0.1]),
    half=st.sampled_from(["nothing", "garbage", "word"]),
    as_words=st.booleans(),
)
@example(words=speech(147, 2116, 0.05, 0.8), longest=8.0, jitter=0.1, half="nothing", as_words=True)
def test_joined_windows_give_the_words_of_the_whole(
    words: list[tuple[str, float, float]], longest: float, jitter: float, half: str, as_words: bool
) -> None:
    """The recognizer writes every word that it hears whole; of half a word it writes nothing, something or all."""
    count = round((words[-1][2] + 1) * 50)
    speech = np.zeros(count, dtype=bool)
    for _, start, end in words:
        speech[int(start * 50) : int(np.ceil(end * 50))] = True
    random = np.random.default_rng(len(words))
    levels = np.where(speech, -20.0, -80.0) + random.normal(size=count)
    windows = [(w.start / RATE, w.stop / RATE) for w in plan_windows(levels, count * 320, RATE, longest, speech)]
    heard = []
    for begin, stop in windows:
        inside = []
        for text, start, end in words:
            if end <= begin or start >= stop:
                continue
            if start < begin or end > stop:
                if half == "nothing":
                    continue
                text = "hm" if half == "garbage" else text
            shift = random.uniform(-jitter, jitter)
            at = min(max(start - begin + shift, 0), stop - begin)
            inside.append((text, at, min(max(at, end - begin + shift), stop - begin)))
        heard.append(transcript(inside, as_words=as_words))
    joined = join_overlaps(heard, windows)
    assert " ".join(part.text for part, _, _ in joined).split() == [text for text, _, _ in words]
    assert all(before[2] <= after[1] for before, after in pairwise(joined))
    for part, start, end in joined:
        for word in spoken_words(part, start, end):
            assert start - 1e-6 <= word.start <= word.end <= end + 0.2


def test_a_cut_lies_in_a_pause_if_there_is_one() -> None:
    speech = np.ones(60 * 50, dtype=bool)
    speech[24 * 50 : 24 * 50 + 10] = False
    levels = np.random.default_rng(0).uniform(-30, -20, len(speech))
    levels[20 * 50] = -70  # quieter than the pause, and no pause: a stop consonant
    first, second, *_ = plan_windows(levels, len(speech) * 320, RATE, 30.0, speech)
    assert first.stop == second.start
    assert 24 <= first.stop / RATE <= 24.2


def test_without_a_pause_windows_overlap_and_text_without_times_is_joined() -> None:
    levels = np.random.default_rng(0).uniform(-30, -20, 50 * 50)
    first, second = plan_windows(levels, len(levels) * 320, RATE, 30.0, np.ones(len(levels), dtype=bool))
    assert first.stop - second.start == 3 * RATE
    texts = [f"w{index}" for index in range(125)]
    windows = [(w.start / RATE, w.stop / RATE) for w in (first, second)]
    heard = [
        Transcript(" ".join(t for i, t in enumerate(texts) if begin <= i * 0.4 and i * 0.4 + 0.4 <= end), (), USAGE)
        for begin, end in windows
    ]
    joined = join_overlaps(heard, windows)
    assert " ".join(part.text for part, _, _ in joined).split() == texts


@pytest.mark.parametrize("stretched", [False, True])
def test_what_one_window_leaves_out_of_the_overlap_is_taken_from_the_other(stretched: bool) -> None:
    """Also where the last word is given all the time that is left, as cross-attention does."""
    early = transcript([("one", 24.0, 24.5), ("two", 25.0, 30.0 if stretched else 25.4)])
    late = transcript([("four", 1.0 - stretched, 1.3), ("five", 2.0, 2.3), ("six", 8.0, 8.3)])
    joined = join_overlaps([early, late], [(0.0, 30.0), (27.0, 57.0)])
    assert [part.text for part, _, _ in joined] == ["one two", "four five six"]
    assert joined[0][2] == joined[1][1] <= 28.3
    full = transcript([("one", 24.0, 24.5), ("two", 28.7, 29.0), ("three", 29.3, 29.6)])
    sparse = transcript([("six", 0.0 if stretched else 8.0, 8.3)])
    joined = join_overlaps([full, sparse], [(0.0, 30.0), (27.0, 57.0)])
    assert [part.text for part, _, _ in joined] == ["one two three", "six"]
    for pair in ([full, transcript([])], [transcript([]), late]):
        texts = [part.text for part, _, _ in join_overlaps(pair, [(0.0, 30.0), (27.0, 57.0)])]
        assert " ".join(texts).split() == [word for part in pair for word in part.text.split()]


def test_a_script_without_spaces_is_joined_and_dropped_word_by_word() -> None:
    """The words of Chinese, Japanese or Thai are the recognizer's tokens; a whole window is not one word."""
    letters = [chr(0x4E00 + i) for i in range(114)]

    def window_text(first: int, stop: int, start: float) -> Transcript:
        times = [(0.5 * i - start, 0.5 * i + 0.5 - start) for i in range(first, stop)]
        tokens = [
            TranscriptToken(text, 0.3 if text == letters[50] else 0.9, *at)
            for text, at in zip(letters[first:stop], times, strict=True)
        ]
        return Transcript("".join(letters[first:stop]), tuple(tokens), USAGE)

    windows = [(0.0, 30.0), (27.0, 57.0)]
    joined = join_overlaps([window_text(0, 60, 0.0), window_text(54, 114, 27.0)], windows)
    assert "".join(part.text for part, _, _ in joined) == "".join(letters)
    assert all("".join(token.text for token in part.tokens) == part.text for part, _, _ in joined)
    assert drop_doubtful(window_text(48, 53, 24.0), 3.0, below=0.5).text == "".join(letters[48:50] + letters[51:53])
    assert left_out(window_text(0, 60, 0.0), np.ones(1500, dtype=bool)) == [], "nothing is missing"


def test_a_token_of_space_begins_a_word() -> None:
    """Tokenizers of sentence pieces have one before digits; times and confidences are those of the tokens."""
    pieces = [("take", 0.9), (" ", 0.9), ("2", 0.2), ("0", 0.8), (" or", 0.7), (" ", 0.9), (" so ", 0.6), ("I", 0.5)]
    tokens = tuple(TranscriptToken(text, p, i * 0.5, i * 0.5 + 0.5) for i, (text, p) in enumerate(pieces))
    heard = Transcript("take 20 or so I", tokens, USAGE)
    words = spoken_words(heard, 0.0, 5.0)
    assert [(word.text, word.confidence, word.timed) for word in words] == [
        ("take", 0.9, True),
        ("20", 0.2, True),
        ("or", 0.7, True),
        ("so", 0.6, True),
        ("I", 0.5, True),
    ]
    sure = drop_doubtful(heard, 5.0, below=0.55)
    assert sure.text == "take or so"
    assert "".join(token.text for token in sure.tokens).split() == ["take", "or", "so"]


def test_windows_that_share_nothing_stay_as_they_are() -> None:
    parts = [transcript([("the", 0.0, 0.5)]), transcript([("the", 0.0, 0.5)])]
    assert join_overlaps(parts, [(0.0, 1.0), (1.0, 2.0)]) == [(parts[0], 0.0, 1.0), (parts[1], 1.0, 2.0)]


def circle(phrase: str, times: int, seconds: float, confidence: float) -> Transcript:
    texts = (phrase.split() * times) + ["end"]
    step = seconds / len(texts)
    return transcript([(t, i * step, (i + 1) * step) for i, t in enumerate(texts)], confidence=confidence)


@pytest.mark.parametrize("phrase", ["you", "thank you", "see you in the next one"])
def test_a_phrase_in_a_circle_is_written_once(phrase: str) -> None:
    size = len(phrase.split())
    fast = circle(phrase, 8, 8 * size / 6, 0.9)
    assert drop_doubtful(fast, 30.0).text == f"{phrase} end"
    assert "".join(token.text for token in drop_doubtful(fast, 30.0).tokens).strip() == f"{phrase} end"
    doubted = circle(phrase, 8, 8 * size, 0.3)
    assert drop_doubtful(doubted, 8 * size).text == f"{phrase} end"
    sung = circle(phrase, 8, 8 * size / 2, 0.9)
    assert drop_doubtful(sung, 30.0) is sung
    assert drop_doubtful(circle(phrase, 3, 3 * size / 6, 0.9), 30.0).text == " ".join([phrase] * 3) + " end"


def test_without_times_a_circle_has_the_time_that_the_others_leave() -> None:
    def kept(text: str, seconds: float) -> str:
        return drop_doubtful(Transcript(text, (), USAGE), seconds).text

    said = " ".join(f"w{i}" for i in range(40))
    assert kept(f"{said}{' in over' * 9}", 10.0) == f"{said} in over"
    assert kept(f"{said}{' in over' * 9}", 12.0) == f"{said}{' in over' * 9}"
    assert kept(f"no no no no we said{' thanks' * 60}", 10.0) == "no no no no we said thanks"
    fast = " ".join(f"w{i}" for i in range(60))
    assert kept(f"no no no no {fast}", 10.0) == f"no no no no {fast}", "all of it is fast"


def test_doubtful_words_are_dropped_with_their_tokens() -> None:
    tokens = (
        TranscriptToken(" sure", 0.9, 0.0, 0.5),
        TranscriptToken(" un", 0.9, 0.5, 0.6),
        TranscriptToken("sure", 0.2, 0.6, 1.0),
        TranscriptToken(" again", 0.8, 1.0, 1.5),
    )
    found = drop_doubtful(Transcript("sure unsure again", tokens, USAGE), 2.0, below=0.5)
    assert found.text == "sure again"
    assert found.tokens == (tokens[0], tokens[3])
    assert drop_doubtful(Transcript("sure unsure again", tokens, USAGE), 2.0).text == "sure unsure again"
