"""`tokenthrift plan` and `tokenize` on video files, and what real clips keep: every bad file has its line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.media_files import encode, film, voice
from tests.tokenizers.vqtoken.published import attention, language_model, tensors, write
from tokenthrift import cli
from tokenthrift.media import video
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken, VQTokenConfig
from tokenthrift.vqtoken.convert import vqtoken
from tokenthrift.vqtoken.evaluation.baselines import BASELINES, COUNTS, ERRORS
from tokenthrift.vqtoken.evaluation.reconstruction import compare, reconstruct, report
from tokenthrift.vqtoken.evaluation.visualize import draw_clip, overlay, region_colors
from tokenthrift.vqtoken.files import sample
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig, VideoAnswerer
from tokenthrift.vqtoken.video_lm.encoders import PixelPatches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    VQToken().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of each kind that may lie in a folder, bad ones among them."""
    folder = tmp_path_factory.mktemp("clips")
    whole = film(folder / "a.mp4", 30)
    film(folder / "short.mp4", 1)
    film(folder / "uneven.mkv", 5, milliseconds=[0, 40, 80, 500, 2000])
    film(folder / "av1.mp4", 12, "libsvtav1")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:-500])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.avi").write_bytes(np.random.default_rng(0).bytes(3000))
    encode(folder / "sound.mp4", voice(0.3), "aac", 16_000)
    (folder / "notes.txt").write_text("not asked for")
    return folder


def rows(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, dict[str, Any]], str]:
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    return {Path(row["file"]).name: row for row in found}, captured.err


JSON = {"plan": ["--json"], "tokenize": []}
BAD = {
    "cut.mp4": "cut short",
    "empty.mp4": "empty: a file of 0 bytes",
    "noise.avi": "video",
    "sound.mp4": "no video: the file holds no picture track",
    "short.mp4": "leaves 0 of 196 tokens",  # 10 a second of 0.04 s
}


def test_plan_tells_the_cost_without_decoding_and_tokenize_keeps_to_it(
    model: Path, clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(clips), "--model", str(model), "--budget", "50,10/s", "--frames", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(video, "decode", lambda *_: pytest.fail("decoded"))
        assert cli.main(["plan", "--json", *arguments]) == 1
    planned, summary = rows(capsys)
    assert set(planned) == {*BAD, "a.mp4", "uneven.mkv", "av1.mp4"}
    assert {name for name, row in planned.items() if "failed" in row} == set(BAD)
    assert all(message in planned[name]["failed"] for name, message in BAD.items())
    assert "5 failed" in summary
    # 30 frames at 25 a second are 1.2 s: 12 tokens; 8 frames of 196 patches.
    assert (planned["a.mp4"]["native"], planned["a.mp4"]["cap"]) == (8 * 196, 12)
    assert planned["uneven.mkv"]["cap"] >= 20
    assert cli.main(["tokenize", *arguments, "--codes", "--batch-size", "3"]) == 1
    made, _ = rows(capsys)
    assert {name for name, row in made.items() if "failed" in row} == set(BAD)
    for name in set(planned) - set(BAD):
        assert made[name]["native"] == planned[name]["native"]
        assert made[name]["tokens"] == made[name]["cap"] == planned[name]["cap"]
        codes = made[name]["codes"]
        assert len(codes) == made[name]["tokens"]
        assert sum(code["share"] for code in codes) == pytest.approx(1, abs=0.01)
        assert all(0 <= code["second"] <= made[name]["seconds"] for code in codes)
    assert made["uneven.mkv"]["frames"] == 5
    assert made["a.mp4"]["encoder"] == "pixels"
    one = [str(clips / "short.mp4"), "--model", str(model), "--budget"]
    assert cli.main(["plan", "--json", *one, "3"]) == 0
    assert rows(capsys)[0]["short.mp4"] == {"file": one[0], "model": str(model), "native": 196, "cap": 3}
    assert cli.main(["tokenize", *one, "1000/s"]) == 0
    assert rows(capsys)[0]["short.mp4"]["tokens"] == 40


def test_a_converted_model_prices_its_own_patches_and_newline(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqtoken([write(tmp_path / "published", tensors(language_model(), attention()))]).save_pretrained(tmp_path / "ours")
    arguments = [str(clips / "a.mp4"), "--model", str(tmp_path / "ours"), "--budget", "9", "--frames", "4"]
    assert cli.main(["plan", "--json", *arguments]) == 0
    planned, _ = rows(capsys)
    assert (planned["a.mp4"]["native"], planned["a.mp4"]["cap"]) == (4 * 9 + 1, 9)
    assert cli.main(["tokenize", *arguments]) == 0
    made, _ = rows(capsys)
    assert (made["a.mp4"]["native"], made["a.mp4"]["tokens"]) == (37, 9)
    assert cli.main(["plan", "--json", *arguments[:-1], "0"]) == 2
    assert "at least one frame" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "ours" / "vlm")
    for command in ("plan", "tokenize"):
        assert cli.main([command, *arguments, *JSON[command]]) == 2
        captured = capsys.readouterr()
        assert "ours holds no vlm/config.json" in captured.err
        assert captured.out == ""


def test_a_clip_too_short_for_the_published_attention_fails_alone(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqtoken([write(tmp_path / "published", tensors(language_model(), attention()))]).save_pretrained(tmp_path / "ours")
    files = [str(clips / "a.mp4"), str(clips / "uneven.mkv")]  # of 1.2 and 2 seconds and more: 4 and 7 tokens
    arguments = [*files, "--model", str(tmp_path / "ours"), "--budget", "4/s", "--frames", "5"]
    for command in ("plan", "tokenize"):
        assert cli.main([command, *arguments, *JSON[command]]) == 1
        made, _ = rows(capsys)
        assert "4 tokens for 5 frames" in made["a.mp4"]["failed"]
        assert made["uneven.mkv"]["cap"] >= 6


def test_a_header_that_counts_frames_that_are_not_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bytearray(film(tmp_path / "whole.mp4", 30).read_bytes())
    table = whole.index(b"stsz")
    whole[table + 16 + 4 * 29 : table + 16 + 4 * 30] = bytes(4)  # the size of the last frame
    (tmp_path / "z.mp4").write_bytes(whole)
    arguments = [str(tmp_path), "--model", str(model), "--budget", "9"]
    assert cli.main(["tokenize", *arguments]) == 0
    made, _ = rows(capsys)
    assert made["whole.mp4"]["tokens"] == made["z.mp4"]["tokens"] == 9


def test_frames_are_spread_as_everywhere_else(tmp_path: Path) -> None:
    path = film(tmp_path / "x.mp4", 31)
    assert sample(path, PixelPatches(), 23).times.tolist() == video.read_frames(path, count=23).seconds.tolist()


def test_an_answerer_uses_its_own_encoder_and_frames(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {
        "num_frames": 4,
        "image_size": 16,
        "patch_size": 8,
        "encoder_hidden_size": 16,
        "encoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 2,
    }
    config = AnswererConfig(
        **sizes,
        token_dim=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vqtoken=VQTokenConfig(),
        frames_per_second=2.0,
    )
    VideoAnswerer(config).save_pretrained(tmp_path / "model")
    arguments = [str(clips / "a.mp4"), str(clips / "short.mp4"), "--model", str(tmp_path / "model"), "--budget", "5"]
    assert cli.main(["plan", "--json", *arguments]) == 0
    planned, _ = rows(capsys)
    assert cli.main(["tokenize", *arguments]) == 0
    made, _ = rows(capsys)
    for name in ("a.mp4", "short.mp4"):
        assert (planned[name]["native"], planned[name]["cap"]) == (16, 5)
        assert (made[name]["native"], made[name]["tokens"], made[name]["frames"]) == (16, 5, 4)
    assert made["a.mp4"]["seconds"] == pytest.approx(1.2)


def test_rebuilding_is_measured_against_the_mean() -> None:
    native = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert reconstruct(native, native) == pytest.approx((1, 0), abs=1e-9)
    assert reconstruct(native, native.mean(0, keepdim=True))[0] == pytest.approx(0)
    assert reconstruct(native, native.mean(0, keepdim=True) + 9)[0] < -1
    assert reconstruct(torch.ones(4, 3), torch.ones(1, 3))[0] == 1.0


def test_every_method_is_compared_and_clusters_keep_the_most() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 16, generator=generator) * 3
    native = centers[torch.randint(6, (128,), generator=generator)] + 0.1 * torch.randn(128, 16, generator=generator)
    batch = TokenBatch.from_items([native], [1.0], [(2, 8, 8)])
    found = compare("clip", batch, VQToken(), (8,), (0.2,))
    at = {row.method: row for row in found}
    assert set(at) == {"VQToken", "VQToken, adaptive", *BASELINES}
    assert at["VQToken"].tokens == 8
    assert at["VQToken"].explained > 0.99
    assert at["VQToken, adaptive"].tokens <= 8
    assert all(at["VQToken"].explained >= at[name].explained for name in BASELINES)


def test_a_report_on_real_files_with_pictures(clips: Path, tmp_path: Path) -> None:
    class Coarse(PixelPatches):
        """Fewer patches, for speed."""

        def grid(self, frames: int) -> tuple[int, int, int]:
            return frames, 7, 7

        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            return super().encode(frames).view(-1, 7, 2, 7, 2, 49).mean((2, 4)).view(-1, 49)

    tables, figures, notes = report(clips, Coarse(), tmp_path, counts=(8,), errors=(0.3,), frames=4)
    assert any("Left out: sound.mp4: no video" in note for note in notes)
    assert {row[1] for row in tables[0].rows} == {"VQToken", "VQToken, adaptive", *BASELINES}
    assert [row[0] for row in tables[1].rows] == ["a.mp4", "av1.mp4", "short.mp4", "uneven.mkv"]
    assert tables[2].columns == ("clip", "frames", "decode", "encode", "reduce to 8")
    assert [row[:2] for row in tables[2].rows] == [("a.mp4", 4), ("av1.mp4", 4), ("short.mp4", 1), ("uneven.mkv", 4)]
    assert all(isinstance(spent, float) and spent > 0 for row in tables[2].rows for spent in row[2:])
    assert set(figures) == {"reconstruction"}
    assert sorted(path.name for path in (tmp_path / "visualizations").iterdir()) == [
        *("a.png", "av1.png", "short.png", "uneven.png")
    ]
    tables = report(clips / "a.mp4", Coarse(), tmp_path, frames=4)[0]  # as the questions are asked, unless told
    asked = {row[0] for row in tables[0].rows}
    assert asked == {*map(str, COUNTS), *(f"e{error}" for error in ERRORS)}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="no clip could be read.*0 bytes"):
        report(tmp_path / "bad", PixelPatches(), tmp_path)


def test_clips_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for folder, count in (("a", 4), ("b", 30)):
        film(tmp_path / "clips" / folder / "x.mp4", count)
    tables, _, notes = report(tmp_path / "clips", PixelPatches(), tmp_path, counts=(8,), errors=(), frames=2)
    assert [row[0] for row in tables[1].rows] == ["a/x.mp4", "b/x.mp4"]
    assert tables[1].rows[0][1] != tables[1].rows[1][1]
    assert "a/x.mp4, b/x.mp4" in notes[-1]


def test_regions_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert len({tuple(color) for color in region_colors(32).round().tolist()}) == 32
    gray = np.full((8, 8, 3), 100, dtype=np.uint8)
    painted = overlay(gray, np.array([[0, 1], [0, 1]]), np.array([[255, 0, 0], [0, 0, 255]], dtype=np.float32))
    assert painted[4, 0, 0] > painted[4, 0, 2]
    assert painted[4, 7, 2] > painted[4, 7, 0]
    assert (painted[:, 4] > painted[:, 5]).any()
    frames = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    maps = {"2 tokens": torch.tensor([[[0, 1]], [[0, 1]], [[1, 1]]])}
    for columns, aspect in ((2, 1.0), (8, 2.0)):
        draw_clip(tmp_path / "clip.png", "a clip", frames, torch.arange(3.0), maps, columns=columns, aspect=aspect)
        with image.open(tmp_path / "clip.png") as picture:
            width = 144 * aspect + 6
            assert picture.width == 6 + min(columns, 3) * width
