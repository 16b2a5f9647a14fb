"""The real VLMEvalKit runs tiny local tasks with our model, end to end: `make harness`, in its own environment."""

from __future__ import annotations

import base64
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.media_files import film
from tests.multimodal.tiny_processors import save_llava, save_qwen, save_qwen3

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"llava": save_llava, "qwen": save_qwen, "qwen3": save_qwen3}
CASES = [("llava", "merging"), ("llava", "vqtoken"), ("qwen", "uniform"), ("qwen3", "tome")]
# A data set of clips of our own: VLMEvalKit has a base class for it, and no table to read it from.
CLIPS = """
import vlmeval.dataset as kit
from vlmeval.dataset.video_base import VideoBaseDataset


class TinyClips(VideoBaseDataset):
    TYPE = "VQA"

    @classmethod
    def supported_datasets(cls):
        return ["TinyClips"]

    def prepare_dataset(self, dataset):
        return {"root": ".", "data_file": "TinyClips.tsv"}

    def build_prompt(self, idx, video_llm):
        line = self.data.iloc[idx]
        return [{"type": "video", "value": line["video"]}, {"type": "text", "value": line["question"]}]

    def evaluate(self, eval_file, **judge):
        return {"answered": 1.0}


kit.supported_video_datasets["TinyClips"] = lambda **options: TinyClips("TinyClips", nframe=4)
from tokenthrift.harnesses.vlmevalkit import main

main()
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    picture = base64.b64encode((ROOT / "samples/pictures/street.jpg").read_bytes()).decode()
    film(folder / "clip.mp4", 12)
    tables = {"TinyPictures": ("image", [picture] * 2), "TinyClips": ("video", [str(folder / "clip.mp4")])}
    for name, (kind, values) in tables.items():
        rows = [["index", kind, "question", "answer"]]
        rows += [[str(i), value, f"what is it {i}", "x"] for i, value in enumerate(values)]
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(rows)
    (folder / "clips.py").write_text(CLIPS)
    return folder


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("family", "reducer"), CASES)
def test_pictures_and_clips_end_to_end(family: str, reducer: str, tasks: Path, tmp_path: Path) -> None:
    source = FAMILIES[family](tmp_path / "model")
    data = ["TinyClips"] if reducer == "vqtoken" else ["TinyPictures", "TinyClips"]
    command = [sys.executable, "clips.py", "--pretrained", source, "--reducer", reducer, "--budget", "2"]
    command += ["--", "--data", *data, "--model", "Tokenthrift", "--mode", "infer", "--work-dir", str(tmp_path / "out")]
    environment = {**os.environ, "LMUData": str(tasks), "PRED_FORMAT": "tsv"}
    done = subprocess.run(
        command, cwd=tasks, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in data:
        (predictions,) = (tmp_path / "out").rglob(f"Tokenthrift_{name}.tsv")
        with predictions.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert rows
        assert all(row["prediction"] for row in rows)
        counts = rf"^{name}: (\d+) questions.*native_visual_tokens: (\d+), visual_tokens: (\d+)$"
        (found,) = re.findall(counts, done.stdout, re.MULTILINE)
        questions, native, used = map(int, found)
        assert questions == len(rows)
        assert 0 < used <= 2 * questions < native
