"""VQToken as a model of lmms-eval and of VLMEvalKit, through stand-ins of what those document."""

import logging
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tests.media_files import film
from tests.tokenizers.vqtoken import harnesses
from tests.tokenizers.vqtoken.published import attention, language_model, tensors, write
from tokenthrift.harnesses.base import harness_class
from tokenthrift.vqtoken.convert import vqtoken
from tokenthrift.vqtoken.harnesses import lmms_eval, vlmevalkit

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = write(folder / "published", tensors(language_model(), attention()))
    vqtoken([source]).save_pretrained(folder / "ours")
    return folder / "ours"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    harness_class.cache_clear()
    return harnesses.install(monkeypatch)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return film(tmp_path / "clip.mp4", 12)


def request(question: str, visuals: list[Any] | None, number: int, **settings: Any) -> harnesses.Request:
    see: Callable[[Any], Any] = lambda doc: visuals  # noqa: E731
    return harnesses.Request((question, {"max_new_tokens": 4, "until": ["\n\n"], **settings}, see, number, "t", "test"))


def test_lmms_eval_finds_the_model_and_makes_it_of_arguments(
    table: dict[str, Any], converted: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    name, value = "tokenthrift_vqtoken", declared["lmms_eval.models"]["tokenthrift_vqtoken"]
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert isinstance(manifest, harnesses.ModelManifest)
    assert manifest.simple_class_path is not None
    module, _, name = manifest.simple_class_path.rpartition(".")
    kind = getattr(import_module(module), name)
    assert issubclass(kind, harnesses.lmms)
    assert kind.is_simple
    model = kind.create_from_arg_string(
        f"pretrained={converted},budget=9,max_frames_num=4,dtype=float32", {"batch_size": 1, "device": "cpu"}
    )
    model.task_dict = {"t": {"test": list(range(9))}}
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    with caplog.at_level(logging.INFO, "lmms-eval"):
        results = model.generate_until(
            [
                request("w5 w6", [str(clip)], 0),
                request("<image>w5 w6", [str(clip)], 1),
                request("w5 w6", [str(broken)], 2),
                request("w5 w6", None, 3),
            ]
        )
    answers = [result.text for result in results]
    counts = [result.token_counts for result in results]
    assert counts[0].input_tokens == counts[3].input_tokens + 9
    assert counts[0].output_tokens > counts[2].output_tokens == 0
    assert answers[0] == answers[1]
    assert answers[0]
    assert answers[3]
    assert answers[2] == ""
    assert "broken.mp4" in caplog.text
    assert "2 videos, 9.00 tokens each, newline included" in caplog.text
    assert [kept[2] for kept in model.cache_hook.kept] == answers
    model.budget = "9,2/s"
    assert model.generate_until([request("w5 w6", [str(clip)], 0)])[0].text == ""  # 0.48 s
    assert "clip.mp4: {" in caplog.text
    model.budget = "9"
    with pytest.raises(ValueError, match="one video file a question, not 2 of str"):
        model.generate_until([request("w5", [str(clip)] * 2, 0)])
    with pytest.raises(ValueError, match="one video file a question, not 1 of bytes"):
        model.generate_until([request("w5", [b""], 0)])
    with pytest.raises(ValueError, match="greedily"):
        model.generate_until([request("w5", [str(clip)], 0, do_sample=True)])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="tokenthrift_vqtoken .*; choose a task of type generate_until"):
            method([])
    with pytest.raises(ValueError, match="4 tokens for 4 frames"):
        kind.create_from_arg_string(f"pretrained={converted},budget=4,max_frames_num=4,dtype=float32,device=cpu")
    with pytest.raises(ValueError, match="--batch_size 1"):
        kind.create_from_arg_string(f"pretrained={converted}", {"batch_size": 2})
    with pytest.raises(TypeError, match="unknown"):
        kind.create_from_arg_string(f"pretrained={converted},unknown=1")
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = lmms_eval.Other


def test_ceilings_and_choices_fit_between_the_commas_of_lmms_eval(
    table: dict[str, Any], converted: Path, clip: Path
) -> None:
    kind: Any = lmms_eval.LmmsVQToken
    fixed = f"pretrained={converted},max_frames_num=4,dtype=float32,device=cpu"
    model = kind.create_from_arg_string(f"{fixed},budget=30+20/s")
    chosen = kind.create_from_arg_string(f"{fixed},budget=30,selection_method=elbow")
    for one in (model, chosen):
        one.task_dict = {"t": {"test": [0]}}
        assert one.generate_until([request("w5 w6", [str(clip)], 0)])[0].text
    assert [usage.used for usage in model.usages] == [9]  # 20 a second of 0.48 s
    assert model.chat.reducer.config.selection_method == "fixed"
    assert chosen.usages[0].used < chosen.usages[0].cap == 30
    assert chosen.chat.reducer.config == replace(model.chat.reducer.config, selection_method="elbow")
    with pytest.raises(ValueError, match="selection_method"):
        kind.create_from_arg_string(f"{fixed},selection_method=best")
    vlmevalkit.register("elbow", str(converted), device="cpu", dtype="float32", selection_method="elbow")
    assert table["elbow"]().chat.reducer.config.selection_method == "elbow"


def test_vlmevalkit_answers_messages(table: dict[str, Any], converted: Path, clip: Path, tmp_path: Path) -> None:
    vlmevalkit.register("VQToken-8", str(converted), budget=9, max_new_tokens=4, device="cpu", dtype="float32")
    model = table["VQToken-8"]()
    assert harnesses.BaseModel in type(model).__mro__
    assert model.VIDEO_LLM
    model.nframe = 4  # as VLMEvalKit does for a data set of four frames
    text = {"type": "text", "value": "w5 w6"}
    answer = model.generate([{"type": "video", "value": str(clip)}, text])
    assert answer
    assert model.generate([text])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    assert model.generate([{"type": "video", "value": str(broken)}, text]) == ""
    model.budget = "9,2/s"
    assert model.generate([{"type": "video", "value": str(clip)}, text]) == ""
    model.budget = "4"
    with pytest.raises(ValueError, match="4 frames"):
        model.generate([{"type": "video", "value": str(clip)}, text])
    with pytest.raises(ValueError, match="one video, not 2"):
        model.generate([{"type": "video", "value": str(clip)}] * 2)
    with pytest.raises(AssertionError, match="Invalid input type"):
        model.generate([{"type": "image", "value": "x.png"}])
    with pytest.raises(TypeError, match="use_vllm"):
        table["VQToken-8"](use_vllm=False)


def test_vlmevalkits_own_script_runs_with_the_model(
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["python"])
    with pytest.raises(SystemExit):
        vlmevalkit.main(["--pretrained", "somewhere"])
    assert "no run.py here" in capsys.readouterr().err
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "if __name__ == '__main__':\n    print(sys.argv, sorted(supported_VLM))\n"
    )
    vlmevalkit.main(["--pretrained", "somewhere", "--", "--data", "Video-MME", "--model", "VQToken"])
    assert "['run.py', '--data', 'Video-MME', '--model', 'VQToken'] ['VQToken']" in capsys.readouterr().out
