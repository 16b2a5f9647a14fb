"""The real lmms-eval 0.7.3 runs tiny local tasks with our model, end to end: `make harness`, in its own environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.media_files import film
from tests.multimodal.tiny_processors import save_llava, save_qwen, save_qwen3

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"llava": save_llava, "qwen": save_qwen, "qwen3": save_qwen3}
CASES = [("llava", "merging"), ("llava", "vqtoken"), ("qwen", "uniform"), ("qwen3", "tome")]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 4, do_sample: false}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""
UTILS = """
from PIL import Image


def pictures(doc):
    return [Image.open(path) for path in doc["files"]]


def clips(doc):
    return list(doc["files"])


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"acc": float(bool(results[0]))}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    clip = film(folder / "clip.mp4", 12)
    picture = str(ROOT / "samples/pictures/street.jpg")
    rows = {"tiny_pictures": [[picture], [picture, picture], []], "tiny_clips": [[str(clip)], [str(clip)]]}
    for name, files in rows.items():
        lines = [json.dumps({"files": f, "question": f"what is it {i}", "answer": "x"}) for i, f in enumerate(files)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        task = TASK.format(name=name, data=folder / f"{name}.jsonl", visual=name.removeprefix("tiny_"))
        (folder / f"{name}.yaml").write_text(task)
    (folder / "utils.py").write_text(UTILS)
    return folder


def evaluate(tasks: Path, out: Path, arguments: str, names: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "tokenthrift", "--model_args", arguments, "--tasks", names]
    command += ["--include_path", str(tasks), "--batch_size", "1", "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, cwd=tasks, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    return json.loads(results.read_text()), done.stdout + done.stderr


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("family", "reducer"), CASES)
def test_pictures_and_clips_end_to_end(family: str, reducer: str, tasks: Path, tmp_path: Path) -> None:
    source = FAMILIES[family](tmp_path / "model")
    names = "tiny_clips" if reducer == "vqtoken" else "tiny_pictures,tiny_clips"
    arguments = f"pretrained={source},reducer={reducer},budget=4,max_frames_num=4"
    results, shown = evaluate(tasks, tmp_path / "out", arguments, names)
    for name in names.split(","):
        efficiency = results["efficiency"]["by_task"][name]
        assert efficiency["total_input_tokens"] > 0
        assert efficiency["docs_with_token_counts"] == results["n-samples"][name]["effective"]
    native, used = (int(re.findall(rf"\b{key}: (\d+)", shown)[-1]) for key in ("native_visual_tokens", "visual_tokens"))
    assert 0 < used < native
    assert "Total elapsed time" in shown
