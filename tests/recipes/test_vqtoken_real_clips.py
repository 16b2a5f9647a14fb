"""The recipe of real clips and its benchmark, on films that are written here and a small encoder."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.media_files import film
from tests.recipes.benchmark_scripts import load_benchmark

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "vqtoken"
TASKS = {"film", "direction", "camera", "cut in", "first word", "speaker"}


def colors(frames: Tensor) -> Tensor:
    """(N, 3, H, W) bytes to (N, 49, 3): what the small encoder sees are the mean colors of 7 x 7 squares."""
    return torch.nn.functional.adaptive_avg_pool2d(frames.float() / 255, 7).flatten(2).transpose(1, 2).half()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    films, grid, people = (folder / name for name in ("films", "grid", "people"))
    for path in (films, grid, people):
        path.mkdir()
    for name, count in (("bikes.mp4", 64), ("carphone_pristine.mp4", 128), ("carphone_distorted.mp4", 128)):
        film(films / name, count)
    lines = []
    for i, verb in enumerate(("bin", "lay", "place", "set") * 2):
        film(grid / f"{i}.mp4", 26)
        lines.append(json.dumps({"video_filepath": f"{i}.mp4", "text": f"{verb} blue at a one now"}))
    (grid / "manifest.jsonl").write_text("\n".join(lines))
    for name in "ab":
        film(people / f"{name}.mp4", 75)
    jpegs, offset = b"", [0]
    for kind in range(10):
        out = io.BytesIO()
        Image.new("RGB", (32, 32), (255 - 20 * kind, 20 * kind, 128)).save(out, "JPEG")
        jpegs += out.getvalue()
        offset.append(len(jpegs))
    np.savez(folder / "pictures.npz", jpeg=np.frombuffer(jpegs, np.uint8), offset=np.array(offset), label=np.arange(10))
    arguments = ["--films", films, "--grid", grid, "--people", people, "--pictures", folder / "pictures.npz"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        recipe: Any = importlib.import_module("real_clips")
        patch.setattr(recipe, "encoder", lambda name: colors)
        patch.setattr(sys, "argv", ["real_clips.py", str(folder / "cache"), *map(str, arguments), "--pasted", "30"])
        recipe.main()
        (folder / "cache" / "camera.safetensors").unlink()
        patch.setattr(recipe.Films, "film", None)  # what is there is not made again
        recipe.main()
    return folder / "cache"


def test_every_task_has_its_clips_and_no_clip_stands_on_both_sides(cache: Path) -> None:
    benchmark = load_benchmark("vqtoken_real_clips")
    assert {path.stem for path in cache.glob("*.safetensors")} == TASKS
    for name in TASKS:
        task = benchmark.Task(**load_file(cache / f"{name}.safetensors"))
        assert task.features.shape[1:] == (8, 49, 3)
        assert len(task.features) == len(task.labels) == len(task.groups)
        test, development = task.part("test"), task.part("development")
        if name in ("film", "speaker"):  # too few recordings to choose on
            assert not len(development.labels)
        assert len(test.labels) + len(development.labels) == len(task.labels)
        assert not set(test.groups.tolist()) & set(development.groups.tolist())
        held = benchmark.held_out(test.groups, test.labels, 0, 0.3)
        assert not set(test.groups[held].tolist()) & set(test.groups[~held].tolist())


def test_labels_are_true(cache: Path) -> None:
    direction = load_file(cache / "direction.safetensors")
    forward, backward = direction["features"].chunk(2)
    assert torch.equal(forward, backward.flip(1))
    film = load_file(cache / "film.safetensors")
    copies = [set(film["groups"][film["labels"] == label].tolist()) for label in (1, 2)]
    assert copies[0] == copies[1]  # a damaged copy never stands on the other side of a split
    camera = load_file(cache / "camera.safetensors")
    moved = camera["features"][1::2] - camera["features"][0::2]
    assert torch.equal(camera["labels"], torch.arange(len(camera["labels"])) % 2)
    assert moved[:, 0].abs().max() == 0  # a window that wanders starts where the other stands
    assert moved[:, -1].abs().max() > 0
    cut, plain = load_file(cache / "cut in.safetensors"), load_file(cache / "film.safetensors")["features"]
    for clip in cut["features"][:10]:
        differing = min(((clip - other).abs().amax((1, 2)) > 0.02).sum().item() for other in plain)
        assert differing == 1  # the photograph is in one frame


def test_the_benchmark_resumes_and_draws(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load_benchmark("vqtoken_real_clips")
    rows, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    kept = {
        name: benchmark.REDUCERS[name] for name in ("ToMe", "VQToken", "pooling", "random", "uniform", benchmark.OURS)
    }
    monkeypatch.setattr(benchmark, "REDUCERS", kept)
    monkeypatch.setattr(benchmark, "COUNTS", (4,))
    monkeypatch.setattr(benchmark, "MOST", 16)
    tasks = ["--tasks", "film", "camera", "cut in", "first word", "--chart", str(chart)]
    monkeypatch.setattr(sys, "argv", ["benchmark", str(cache), "--rows", str(rows), *tasks])
    benchmark.main()
    told = capsys.readouterr().out
    assert "still to montage" in told
    assert "mean: accuracy" in told
    assert "the best baseline" in told
    assert Image.open(chart).size[0] > 1000
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 4 * (1 + 6)
    assert all(len(row["accuracy"]) == benchmark.SPLITS for row in found)
    rows.write_text("\n".join(json.dumps(row) for row in found[:-3]) + "\n")
    benchmark.main()
    again = [json.loads(line) for line in rows.read_text().splitlines()]
    assert again == found
    film = benchmark.Task(**load_file(cache / "film.safetensors"))
    assert {row["task"] for row in benchmark.reducers_table({"film": film}, rows)} == {"film"}


def test_intervals_are_of_splits_that_share_clips_and_of_recordings() -> None:
    benchmark = load_benchmark("vqtoken_real_clips")
    features = torch.zeros(100, 8, 49, 2)
    task = benchmark.Task(features, torch.arange(100) % 2, torch.arange(100))
    assert task.test_to_training() == pytest.approx(30 / 70)
    scores = {"camera": (0.5, 0.6, 0.7, 0.6, 0.5), "film": (0.7, 0.8, 0.9, 0.8, 0.7)}
    ways = {name: (0.1, 0.1, 0.3, 0.2, 0.3) if name == "pooling" else (0.0,) * 5 for name in benchmark.REDUCERS}
    rows = [
        {"task": name, "reducer": way, "count": count, "accuracy": np.add(scores[name], more).tolist()}
        for name in scores
        for way, more in ways.items()
        for count in benchmark.COUNTS
    ]
    cells = list(benchmark.best_baselines(rows, {"camera": 0.0, "film": 0.5}).columns[1].cells)
    # Student's half width is 12.4 points; five splits with half as many test clips as training clips are 1.87 times it.
    assert cells == ["pooling +20.0 ± 12.4 behind", "pooling +20.0 ± 23.2", "pooling +20.0 ± 18.6 behind"]
    labels, groups = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([5, 6, 5, 7, 8])
    assert benchmark.Task(features[:5], labels, groups).recordings() == [0, 1, 0, 0, 1]


def test_all_ways_of_the_adaptive_table_spend_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("vqtoken_real_clips")
    monkeypatch.setattr(benchmark, "MOST", 24)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(6, 8, 49, 5, generator=generator)
    mixed = benchmark.still_to_montage(clips)
    assert torch.equal(mixed[0], clips[0, :1].expand(8, -1, -1))
    assert torch.equal(mixed[6:12], clips)
    frames = {frame.numpy().tobytes() for frame in clips.flatten(0, 1)}
    assert {frame.numpy().tobytes() for frame in mixed[12:].flatten(0, 1)} == frames
    even = benchmark.spread_evenly(50, 18)
    assert even.sum() == 50
    assert even.max() - even.min() == 1
    rows = benchmark.adaptive_table("noise", mixed, 3 * list(range(6)))
    assert [row["rule"].split()[0] for row in rows] == ["gain"] * 4 + ["error"] * 3
    gains = [row["one K, same tree, gain"] for row in rows if row["rule"] == "gain 0.005"]
    assert gains[0][0] > gains[0][1] > 0  # stills need few codes: content decides better than one K for all


def test_weights_of_the_vit_have_their_names_and_are_not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cls": "backbone.embeddings.cls_token", "end": "onnx::Concat_1", "rest": "onnx::Reshape_2"}
    arrays = {
        names["cls"]: np.ones((1, 1, 384), np.float32),
        names["end"]: np.full((1, 1, 384), 2, np.float32),
        names["rest"]: np.full((1, 4, 384), 3, np.float32),
        "onnx::MatMul_3": np.arange(6, dtype=np.float32).reshape(2, 3),
        "decoder.bn1.weight": np.ones(3, np.float32),
    }
    nodes = {
        "/backbone/embeddings/Concat_6": [names["end"], "x"],
        "/backbone/embeddings/Reshape_1": [names["rest"], "x"],
        "/backbone/encoder/layer.0/mlp/fc1/MatMul": ["x", "onnx::MatMul_3"],
        "/backbone/encoder/layer.0/attention/attention/MatMul": ["x", "y"],
    }
    rows = [SimpleNamespace(name=name, array=array) for name, array in arrays.items()]
    graph = SimpleNamespace(
        initializer=rows, node=[SimpleNamespace(name=name, input=inputs) for name, inputs in nodes.items()]
    )
    monkeypatch.setitem(sys.modules, "onnx", ModuleType("onnx"))
    helper = ModuleType("onnx.numpy_helper")
    vars(helper)["to_array"] = lambda row: row.array
    monkeypatch.setitem(sys.modules, "onnx.numpy_helper", helper)
    monkeypatch.syspath_prepend(str(RECIPE))
    recipe: Any = importlib.import_module("real_clips")
    found = recipe.vit_weights(graph)
    assert set(found) == {
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
        "encoder.layer.0.mlp.fc1.weight",
    }
    assert torch.equal(found["encoder.layer.0.mlp.fc1.weight"], torch.arange(6.0).view(2, 3).T)
    assert found["embeddings.position_embeddings"][0, :, 0].tolist() == [2, 3, 3, 3, 3]
