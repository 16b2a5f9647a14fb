"""What is in a folder: read, or named as left out; links followed once; content before suffix."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.media_files import film, voice, write
from tokenthrift.karl.training.data import Images
from tokenthrift.media.files import InputError, find_files
from tokenthrift.media.suffixes import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A folder with recordings under odd names, text, and a link to another with one more."""
    folder, store = tmp_path / "calls", tmp_path / "store"
    sound = write(folder / "a.flac", voice(0.2))
    store.mkdir()
    shutil.copy(sound, store / "monday.flac")
    (folder / "linked").symlink_to(store)
    for name in ("b.mpga", "c.3gpp", "d.m4r", "e.sph", "msg0001"):
        shutil.copy(sound, folder / name)
    (folder / "notes.txt").write_text("call back")
    return folder


def names(files: list[Path]) -> list[str]:
    return sorted(path.name for path in files)


def test_what_is_not_read_is_counted_and_named(calls: Path) -> None:
    found = find_files([str(calls)], MEDIA_SUFFIXES, "recording")
    assert names([file.path for file in found]) == ["a.flac", "monday.flac"]
    assert names(found.left_out) == ["b.mpga", "c.3gpp", "d.m4r", "e.sph", "msg0001"]
    assert found.others == 1
    remark = found.remark("name them or use --any-suffix")
    assert remark.startswith("5 left out: ")
    assert "msg0001" in remark
    assert remark.endswith("; name them or use --any-suffix")
    assert find_files([str(calls / "linked")], MEDIA_SUFFIXES, "recording").remark() == ""


def test_any_suffix_reads_by_content(calls: Path) -> None:
    found = find_files([str(calls)], MEDIA_SUFFIXES, "recording", any_suffix=True)
    assert len(found) == 7
    assert found.left_out == []
    assert len({file.output for file in found}) == 7
    pattern = find_files([f"{calls}/*"], MEDIA_SUFFIXES, "recording")
    assert (len(pattern), len(pattern.left_out)) == (1, 5)


def test_a_file_that_is_named_is_not_left_out(calls: Path) -> None:
    found = find_files([str(calls), str(calls / "msg0001")], MEDIA_SUFFIXES, "recording")
    assert names(found.left_out) == ["b.mpga", "c.3gpp", "d.m4r", "e.sph"]


def test_a_folder_of_unknown_suffixes_alone_says_so(calls: Path) -> None:
    (calls / "a.flac").unlink()
    (calls / "linked").unlink()
    with pytest.raises(InputError, match=r"5 left out: .*b\.mpga.*--any-suffix"):
        find_files([str(calls)], MEDIA_SUFFIXES, "recording")


def test_links_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one / "x.wav", voice(0.1))
    write(two / "y.wav", voice(0.1))
    (one / "to_two").symlink_to(two)
    (one / "again").symlink_to(two)
    (two / "to_one").symlink_to(one)
    (one / "loop").symlink_to(one)
    found = [str(file.path.relative_to(one)) for file in find_files([str(one)], MEDIA_SUFFIXES, "recording")]
    assert found == ["again/y.wav", "x.wav"]


def test_a_file_that_several_arguments_lead_to_is_done_once(calls: Path, tmp_path: Path) -> None:
    """By itself, behind a link, in a folder and in a link to it; two names in one folder stay two."""
    link, mirror = tmp_path / "link.flac", tmp_path / "mirror"
    link.symlink_to(calls / "a.flac")
    mirror.symlink_to(calls)
    once = find_files([str(calls)], MEDIA_SUFFIXES, "recording")
    again = find_files([str(calls), str(link), str(mirror), f"{mirror}/*"], MEDIA_SUFFIXES, "recording")
    assert list(again) == list(once)
    assert (again.left_out, again.others) == (once.left_out, once.others)
    for arguments in ([link, calls / "a.flac"], [calls / "a.flac", link]):
        (file,) = find_files(map(str, arguments), MEDIA_SUFFIXES, "recording")
        assert (file.path, file.argument) == (arguments[0], 0)
    unknown = tmp_path / "b.flac"
    unknown.symlink_to(calls / "b.mpga")
    assert "b.mpga" not in names(find_files([str(calls), str(unknown)], MEDIA_SUFFIXES, "recording").left_out)
    (calls / "same.flac").symlink_to("a.flac")
    assert {"a.flac", "same.flac"} <= {file.path.name for file in find_files([str(calls)], MEDIA_SUFFIXES, "recording")}


def test_pictures_and_clips_alike(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "images/n01").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/n01/{number}.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/n01").symlink_to(tmp_path / "images/n01")
    assert len(Images({str(tmp_path / "linked"): 1}, 8, None)) == 3
    (tmp_path / "images/n01/2.png").rename(tmp_path / "images/n01/2.img")
    film(tmp_path / "images/clip.mp4", 3)
    found = find_files([str(tmp_path / "images")], IMAGE_SUFFIXES, "image")
    assert (len(found), names(found.left_out), found.others) == (2, ["2.img"], 1)
    with pytest.warns(UserWarning, match=r"1 left out: .*2\.img"):
        Images({str(tmp_path / "images"): 1}, 8, None)
    (tmp_path / "images/clip.mp4").rename(tmp_path / "images/clip")
    film(tmp_path / "images/other.mp4", 3)
    clips = find_files([str(tmp_path / "images")], VIDEO_SUFFIXES, "video")
    assert (len(clips), names(clips.left_out)) == (1, ["clip"])
