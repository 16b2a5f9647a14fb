"""Which recordings arguments name, where their outputs go, and manifests of references."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.media.files import FoundFile, InputError, find_files
from tokenthrift.media.suffixes import MEDIA_SUFFIXES
from tokenthrift.transcription.references import ManifestError, read_references
from tokenthrift.transcription.results import FileTranscript, total_usage


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of any kind, without content: finding them opens none."""
    names = "a/x.wav a/sub/y.MP3 a/notes.txt a/.hidden.wav a/.git/z.wav b/x.wav b/x.mp3 b/[1].wav c/readme.md odd.dat"
    for name in [*names.split(), "top.m4a"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find_recordings(arguments: Iterable[str]) -> list[FoundFile]:
    return find_files(arguments, MEDIA_SUFFIXES, "recording")


def found(*arguments: str) -> dict[str, str]:
    return {str(recording.path): str(recording.output) for recording in find_recordings(arguments)}


def test_a_folder_is_walked_and_mirrored(tree: Path) -> None:
    assert found("a") == {"a/sub/y.MP3": "sub/y", "a/x.wav": "x"}
    assert found(str(tree / "a")) == {f"{tree}/a/sub/y.MP3": "sub/y", f"{tree}/a/x.wav": "x"}


def test_a_named_file_is_tried_whatever_its_suffix(tree: Path) -> None:
    assert found("odd.dat", "a/.hidden.wav") == {"odd.dat": "odd", "a/.hidden.wav": ".hidden"}


def test_patterns(tree: Path) -> None:
    assert found("*/x.*") == {"a/x.wav": "a/x", "b/x.mp3": "b/x.mp3", "b/x.wav": "b/x.wav"}
    assert list(found("**/*")) == ["a/sub/y.MP3", "a/x.wav", "b/[1].wav", "b/x.mp3", "b/x.wav", "top.m4a"]
    assert found("a/s?b/*") == {"a/sub/y.MP3": "sub/y"}


def test_a_file_with_brackets_is_no_pattern(tree: Path) -> None:
    assert found("b/[1].wav") == {"b/[1].wav": "[1]"}


def test_same_stem_keeps_the_suffix(tree: Path) -> None:
    assert found("b") == {"b/[1].wav": "[1].wav", "b/x.mp3": "x.mp3", "b/x.wav": "x.wav"}


def test_same_path_below_two_arguments_mirrors_the_folders_above(tree: Path) -> None:
    assert found("a/x.wav", "b/x.wav") == {"a/x.wav": "a/x", "b/x.wav": "b/x"}
    assert found("b/x.wav", "a") == {"b/x.wav": "b/x", "a/sub/y.MP3": "a/sub/y", "a/x.wav": "a/x"}


def test_a_file_named_twice_counts_once(tree: Path) -> None:
    assert list(found("a/x.wav", "a", str(tree / "a"), "./a/../a/x.wav")) == ["a/x.wav", "a/sub/y.MP3"]


def test_links(tree: Path) -> None:
    (tree / "a/loop").symlink_to(tree / "a")
    (tree / "a/gone.wav").symlink_to(tree / "nowhere.wav")
    assert list(found("a")) == ["a/gone.wav", "a/sub/y.MP3", "a/x.wav"]


def test_arguments_that_lead_to_nothing_are_all_named(tree: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_recordings(["a", "missing.wav", "c", "*.flac"])
    message = str(caught.value)
    for part in ("missing.wav: no such file", "c: a folder without recordings", "*.flac: no recording matches"):
        assert part in message


names = st.sampled_from(["x.wav", "x.mp3", "x", "x.wav.mp3", "y.wav", "x.txt.wav", "z/x.wav", "z/x.ogg"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["p", "p/q", "r"]), names), min_size=1, max_size=10), st.booleans())
def test_no_two_recordings_share_an_output(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, str]], by_folder: bool
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folder, name in files:
        path = root / folder / name
        if not path.is_dir() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    every = sorted(path for path in root.rglob("*") if path.is_file())
    folders = [folder for folder in ("p", "r") if any(p.suffix for p in (root / folder).rglob("*") if p.is_file())]
    arguments = [str(root / folder) for folder in folders] if by_folder else [str(path) for path in every]
    if not arguments:
        return
    recordings = find_recordings(arguments)
    outputs = [f"{recording.output}.{form}" for recording in recordings for form in ("txt", "json", "srt", "vtt")]
    assert len(set(outputs)) == len(outputs) == 4 * len(recordings)
    assert not any(os.path.isabs(output) or ".." in Path(output).parts for output in outputs)


def result(path: Path, text: str, error: str | None = None) -> FileTranscript:
    from tokenthrift.transcription.results import Segment

    segments = (Segment(0, 1, text, (), total_usage(())),) if text else ()
    return FileTranscript(path, 1.0, segments, total_usage(()), 1, error)


def test_references(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(
        '{"audio_filepath": "a.wav", "text": "He said: it IS over!", "duration": 1.0}\n\n'
        '{"audio_filepath": "sub/b.wav", "text": "nothing"}\n'
    )
    references = read_references(manifest)
    first = references.score(result(tmp_path / "a.wav", "he said it is done"))
    assert first is not None
    assert (first.errors, first.total) == (1, 5)
    assert references.score(result(tmp_path / "sub" / "b.wav", "")) is not None
    assert references.score(result(tmp_path / "c.wav", "no reference")) is None
    assert references.score(result(tmp_path / "a.wav", "", "unreadable")) is None
    assert references.words.rate == pytest.approx(2 / 6)
    assert references.scored == 2


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"text": "x"}', '{"audio_filepath": "a.wav", "text": 3}', "[" * 100_000]
)
def test_a_bad_manifest_names_the_line(line: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(f'{{"audio_filepath": "a.wav", "text": "x"}}\n{line}\n')
    with pytest.raises(ManifestError, match="line 2"):
        read_references(manifest)
    with pytest.raises(ManifestError, match="No such file"):
        read_references(tmp_path / "missing.jsonl")
