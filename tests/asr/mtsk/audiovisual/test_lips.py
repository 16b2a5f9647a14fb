"""Mouth crops of talking faces: where the mouth is, and what every kind of unsuitable video gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.talking import Pictures, SquareFinder, face, write_video
from tokenthrift.media.audio import AudioError, read_audio
from tokenthrift.media.video import VideoError, read_frames_at
from tokenthrift.mtsk.audiovisual import lips
from tokenthrift.mtsk.audiovisual.lips import CROP, MEAN_GRAY, FaceError, mouth_path, read_lips

GRID = Path(__file__).resolve().parents[5] / "shared" / "data" / "grid"
Box = tuple[float, float, float] | None


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The face is a grey square, found exactly: what is tested is all that happens around the detector."""
    monkeypatch.setattr(lips, "_FaceFinder", SquareFinder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first second of a real clip, as grey frames in a file."""
    clip = GRID / "bbaf2n.mpg"
    if not clip.exists():
        pytest.skip(f"no real talking face at {clip}")
    frames = read_frames_at(clip, 25).pixels[:25, 1].numpy()
    return write_video(tmp_path_factory.mktemp("talker") / "second.mkv", frames)


@pytest.mark.usefixtures("squares")
def test_the_crop_has_the_mouth_in_its_middle(tmp_path: Path) -> None:
    found = read_lips(write_video(tmp_path / "face.mkv", np.stack([face()] * 5)))
    assert found.pixels.shape == (5, CROP, CROP)
    assert found.pixels.dtype == torch.uint8
    assert found.seen.all()
    bright = (found.pixels[2] > 200).nonzero().float().mean(0)
    assert (bright - CROP / 2).abs().max() < 4
    assert found.pixels[2][48, 0] == 120, "cheeks on both sides"


@pytest.mark.usefixtures("squares")
def test_a_face_at_the_edge_of_the_picture_gives_whole_crops(tmp_path: Path) -> None:
    found = read_lips(write_video(tmp_path / "edge.mkv", np.stack([face(left=160, top=110)] * 3)))
    assert found.pixels.shape == (3, CROP, CROP)
    assert found.seen.all()


@pytest.mark.usefixtures("squares")
@pytest.mark.parametrize(("fps", "frames"), [(12, 24), (25, 50), (60, 120)])
def test_any_frame_rate_becomes_25(tmp_path: Path, fps: int, frames: int) -> None:
    pictures = np.stack([face(mouth=130 + round(100 * i / frames)) for i in range(frames)])
    found = read_lips(write_video(tmp_path / "clip.mkv", pictures, fps))
    assert len(found.pixels) == 50
    mouth = found.pixels[:, 44:52, 44:52].float().mean((1, 2))
    shown = torch.tensor([130 + round(100 * int(k / 25 * fps) / frames) for k in range(50)])
    assert (mouth - shown).abs().max() <= 100 / frames + 2, "what is on screen at k / 25 s"


@pytest.mark.usefixtures("squares")
def test_a_video_without_a_face_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wall.mkv", np.full((10, 120, 160), 20, np.uint8))
    with pytest.raises(FaceError, match=r"wall\.mkv: no face in any of 10 frames"):
        read_lips(path)


def test_the_detector_finds_no_face_in_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 120, 160), dtype=np.uint8)
    with pytest.raises(FaceError, match="no face"):
        read_lips(write_video(tmp_path / "noise.mkv", noise))


@pytest.mark.usefixtures("squares")
def test_a_face_that_leaves_is_grey_until_it_is_back(tmp_path: Path) -> None:
    nothing = np.full_like(face(), 20)
    pictures = np.stack([face()] * 10 + [nothing] * 20 + [face()] * 10 + [nothing] * 5 + [face()] * 5)
    found = read_lips(write_video(tmp_path / "leaves.mkv", pictures))
    assert found.seen.tolist() == [True] * 10 + [False] * 20 + [True] * 10 + [False] * 5 + [True] * 5
    assert (found.pixels[10:30] == MEAN_GRAY).all()
    assert not (found.pixels[:10] == MEAN_GRAY).all((1, 2)).any()
    # Away for a moment only: the crop stays where the face was, whatever is to be seen there.
    assert (found.pixels[40:45] == 20).all()


@pytest.mark.parametrize("side", [88, 96])
def test_a_mouth_crop_is_taken_as_it_is(tmp_path: Path, side: int) -> None:
    crops = np.random.default_rng(0).integers(0, 256, (4, side, side), dtype=np.uint8)
    found = read_lips(write_video(tmp_path / "crop.mkv", crops))
    assert found.seen.all()
    torch.testing.assert_close(found.pixels, torch.from_numpy(crops), rtol=0, atol=1)


def test_sound_and_pictures_keep_their_own_lengths(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (25, 96, 96), dtype=np.uint8)
    path = write_video(tmp_path / "long.mkv", pictures, samples=torch.rand(20_000) - 0.5, rate=8_000, channels=2)
    assert len(read_lips(path).pixels) == 25
    assert abs(len(read_audio(path)) - 40_000) < 40, "stereo at 8 kHz becomes mono at 16 kHz"


def test_streams_that_are_missing_are_named(tmp_path: Path) -> None:
    mute = write_video(tmp_path / "mute.mkv", np.zeros((5, 96, 96), np.uint8))
    with pytest.raises(AudioError, match=r"mute\.mkv"):
        read_audio(mute)
    text = tmp_path / "text.mp4"
    text.write_bytes(b"nothing to see")
    with pytest.raises(VideoError):
        read_lips(text)


def test_the_lips_of_a_real_face(talker: Path) -> None:
    found = read_lips(talker)
    assert found.pixels.shape == (25, CROP, CROP)
    assert found.seen.all()
    moving = found.pixels.float().std(0)
    assert moving[40:70, 25:71].mean() > 1.5 * moving[:20].mean(), "the mouth moves, the nose does not"


def test_a_real_face_at_12_frames_a_second(talker: Path, tmp_path: Path) -> None:
    whole = read_frames_at(talker, 25).pixels[:, 1].numpy()
    slow = write_video(tmp_path / "slow.mkv", whole[::2][:12], 12)
    found = read_lips(slow)
    assert len(found.pixels) == 25
    assert found.seen.all()


boxes = st.one_of(st.none(), st.tuples(st.floats(0, 500), st.floats(0, 500), st.floats(20, 200)))


@settings(deadline=None, max_examples=50)
@given(st.lists(boxes, min_size=1, max_size=60).filter(any))
def test_every_frame_has_a_place(rows: list[Box]) -> None:
    track, there = mouth_path(rows)
    assert track.shape == (len(rows), 3)
    assert np.isfinite(track).all()
    found = np.array([row for row in rows if row])
    assert (track[:, 2] <= 0.52 * found[:, 2].max() + 1e-9).all()
    assert (track[:, 2] >= 0.52 * found[:, 2].min() - 1e-9).all()
    assert all(there[i] for i, row in enumerate(rows) if row is not None)


def test_a_face_that_moves_is_followed() -> None:
    rows: list[Box] = [(2.0 * i, 50.0, 100.0) for i in range(40)]
    rows[10:15] = [None] * 5
    track, there = mouth_path(rows)
    middle = np.arange(40) * 2.0 + 50
    assert there.all()
    assert np.abs(track[8:32, 0] - middle[8:32]).max() < 1e-6
    assert np.allclose(track[:, 1], 128)


class SquareCascade:
    """The squares of `face` in a picture, in the manner of OpenCV's cascade; counts the pixels it searches."""

    def __init__(self) -> None:
        self.searched: list[int] = []

    def detectMultiScale(
        self, picture: Pictures, scale: float, neighbors: int, minSize: tuple[int, int], maxSize: tuple[int, int]
    ) -> np.ndarray:
        self.searched.append(picture.size)
        box = SquareFinder().find(picture)
        if box is None or not minSize[0] <= box[2] <= maxSize[0]:
            return np.empty((0, 4), dtype=int)
        return np.array([[box[0], box[1], box[2], box[2]]], dtype=int)


def test_a_face_is_looked_for_near_the_last_one() -> None:
    finder: Any = lips._FaceFinder()
    finder.cascade = SquareCascade()
    pictures = [face(left=60 + i) for i in range(5)] + [face(left=150)] * 2
    found = [finder.find(picture) for picture in pictures]
    assert [box[0] for box in found] == [60, 61, 62, 63, 64, 150, 150]
    whole = pictures[0].size
    # All of the first picture, parts of those that follow, and both for the face that jumped.
    assert [size == whole for size in finder.cascade.searched] == [True] + [False] * 5 + [True, False]


def test_every_second_all_of_the_picture_is_searched() -> None:
    finder: Any = lips._FaceFinder()
    finder.cascade = SquareCascade()
    for _ in range(51):
        finder.find(face())
    whole = [i for i, size in enumerate(finder.cascade.searched) if size == face().size]
    assert whole == [0, 25, 50]
