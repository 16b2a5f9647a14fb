"""Subtitles: laws for any segments, times by hand, and files that other programs read."""

from __future__ import annotations

import io
import re
from pathlib import Path

import av
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.budget import TokenUsage
from tokenthrift.transcript import TranscriptToken
from tokenthrift.transcription.results import FileTranscript, Segment
from tokenthrift.transcription.subtitles import Cue, karaoke, make_cues, srt, vtt

NOTHING = TokenUsage(native=0, cap=0, used=0, rounds=0)


def timed(words: list[tuple[str, float, float]], end: float | None = None) -> Segment:
    tokens = tuple(TranscriptToken(f" {word}", 1.0, start, stop) for word, start, stop in words)
    return Segment(words[0][1], end or words[-1][2], " ".join(word for word, _, _ in words), tokens, NOTHING)


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    """Segments one after another, words of any length, with token times or without."""
    found, at = [], draw(st.floats(0, 5_000))
    for _ in range(draw(st.integers(0, 5))):
        words = draw(st.lists(st.text("abz<&{-.'", min_size=1, max_size=60), min_size=1, max_size=25))
        start = at = at + draw(st.floats(0, 10))
        with_times = draw(st.booleans())
        tokens = []
        for word in words:
            begins = at + draw(st.floats(0, 3))
            at = begins + draw(st.floats(0, 2))
            tokens.append(TranscriptToken(f" {word}", 1.0, *((begins, at) if with_times else (None, None))))
        at += draw(st.floats(0.001, 2))
        found.append(Segment(start, at, " ".join(words), tuple(tokens), NOTHING))
    return found


@settings(deadline=None, max_examples=100)
@given(segments())
def test_laws(found: list[Segment]) -> None:
    """Cues are in order, last a while but not long, fit the screen, and lose no word."""
    cues = make_cues(found)
    end = 0
    for cue in cues:
        assert end <= cue.start < cue.end
        assert cue.end - cue.start <= 7_000
        assert 1 <= len(cue.lines) <= 2
        assert all(0 < len(line) <= 42 for line in cue.lines)
        end = cue.end
    said = "".join("".join(segment.text.split()) for segment in found)
    assert "".join("".join("".join(cue.lines).split()) for cue in cues) == said
    # Rounding and words without duration may push the last cues on, by a millisecond each.
    assert not cues or end <= found[-1].end * 1000 + len(cues) + 1


@settings(deadline=None, max_examples=50)
@given(segments())
def test_files_are_well_formed(found: list[Segment]) -> None:
    cues = make_cues(found)
    stamp = r"\d\d:\d\d:\d\d[,.]\d{3}"
    for text, point in ((srt(cues), ","), (vtt(cues), ".")):
        times = re.findall(rf"^({stamp}) --> ({stamp})$", text, re.MULTILINE)
        assert len(times) == len(cues)
        assert all(point in stop and point in start for start, stop in times)
        assert text.count("-->") == len(cues), "text cannot look like a time line"
        assert not re.search(r"<", text), "text cannot look like markup"


def test_scripts_without_spaces() -> None:
    """Full-width characters count twice, lines and cues end between words, and nothing is put between these."""
    words = ["今天", "天气", "很", "好，", "我们", "去", "公园", "散步。"] * 6 + ["OK"]
    tokens = tuple(TranscriptToken(word, 1.0, 0.4 * i, 0.4 * i + 0.4) for i, word in enumerate(words))
    cues = make_cues([Segment(0.0, 20.0, "".join(words), tokens, NOTHING)])
    assert "".join(line for cue in cues for line in cue.lines) == "".join(words)
    assert len(cues) == 7, "a sentence each"
    for cue in cues:
        assert len(cue.lines) <= 2
        assert all(len(line) <= 21 for line in cue.lines)
    assert karaoke(cues).count("<c>") == len(words) - len(cues), "every word but the first of a cue"
    captions = webvtt.from_buffer(io.StringIO(karaoke(cues))).captions
    assert "".join("".join(caption.text.split()) for caption in captions) == "".join(words)
    halves = tuple(
        Segment(at, at + 1, text, (), NOTHING) for at, text in ((0.0, "今天"), (1.0, "很好。"), (2.0, "OK then"))
    )
    assert FileTranscript(Path("a"), 3.0, halves, NOTHING, 3).text == "今天很好。OK then"
    untimed = make_cues([Segment(0.0, 20.0, "あ" * 200, (), NOTHING)])
    assert max(len(line) for cue in untimed for line in cue.lines) == 21


def test_a_cue_with_the_name_of_its_channel_fits_the_screen() -> None:
    text = " ".join(["word"] * 60)
    sides = [Segment(0.0, 30.0, text, (), NOTHING, channel=channel) for channel in ("left", "right")]
    cues = make_cues(sides)
    assert all(1 <= len(cue.lines) <= 2 and cue.lines[0].startswith(("left: ", "right: ")) for cue in cues)
    assert all(len(line) <= 42 for cue in cues for line in cue.lines)
    assert sum(" ".join(cue.lines).split().count("word") for cue in cues) == 120
    assert "left: word <" in karaoke(cues)


def test_times_of_words() -> None:
    (cue,) = make_cues([timed([("Good", 1.0, 1.2), ("morning", 1.25, 2.5)])])
    assert cue == Cue(1000, 2500, ("Good morning",))


def test_word_pieces_are_joined() -> None:
    tokens = tuple(
        TranscriptToken(text, 1.0, start, end)
        for text, start, end in [
            (" un", 1.0, 1.2),
            ("believ", 1.2, 1.5),
            ("able", 1.5, 2.0),
            (".", 2.0, 2.1),
            (" Yes", 4, 5),
        ]
    )
    cues = make_cues([Segment(0, 6, "unbelievable. Yes", tokens, NOTHING)])
    assert [cue.lines for cue in cues] == [("unbelievable.",), ("Yes",)]
    assert [(cue.start, cue.end) for cue in cues] == [(1000, 2100), (4000, 5000)]


def test_without_token_times_the_segment_is_shared_out() -> None:
    cues = make_cues([Segment(10.0, 30.0, " ".join(["word"] * 40), (), NOTHING)])
    assert cues[0].start == 10_000
    assert cues[-1].end == 30_000
    assert len(cues) == 3
    assert all(before.end == after.start for before, after in zip(cues, cues[1:], strict=False))


def test_pauses_and_sentences_end_a_cue() -> None:
    words = [("One", 0.0, 0.5), ("two.", 0.5, 1.5), ("Three", 1.6, 2.0), ("four", 4.0, 4.5)]
    assert [cue.lines for cue in make_cues([timed(words)])] == [("One two.",), ("Three",), ("four",)]


def test_short_cues_stay_until_the_next() -> None:
    cues = make_cues([timed([("No.", 1.0, 1.1), ("Why?", 3.0, 3.2), ("So", 3.5, 3.6)], end=10.0)])
    assert [(cue.start, cue.end) for cue in cues] == [(1000, 2000), (3000, 4000)]


def test_two_lines_of_about_the_same_length() -> None:
    (cue,) = make_cues([Segment(0, 6, "the quick brown fox jumps over the lazy dog tonight", (), NOTHING)])
    assert cue.lines == ("the quick brown fox jumps", "over the lazy dog tonight")


def test_text_by_hand() -> None:
    cues = [Cue(3_725_007, 3_726_000, ("a < b & c", "{d} --> e"))]
    assert srt(cues) == "1\n01:02:05,007 --> 01:02:06,000\na ‹ b & c\n(d) --› e\n"
    assert vtt(cues) == "WEBVTT\n\n01:02:05.007 --> 01:02:06.000\na &lt; b &amp; c\n{d} --&gt; e\n"
    assert srt([]) == ""
    assert vtt([]) == "WEBVTT\n"


def test_ffmpeg_reads_the_files(tmp_path: Path) -> None:
    cues = make_cues([timed([("Hello", 1.0, 1.5), ("there.", 1.5, 2.5), ("a<b", 5.0, 6.0)])])
    for form, text in (("srt", srt(cues)), ("vtt", vtt(cues))):
        path = tmp_path / f"clip.{form}"
        path.write_text(text, encoding="utf-8")
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux() if packet.size]
            times = [float(p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base is not None]
        assert times == [1.0, 5.0]
