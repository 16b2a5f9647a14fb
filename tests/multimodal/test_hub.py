"""Folders of models: what is written, what is read, and what is refused."""

import json
import pickle
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.hub_server import HubServer
from tests.multimodal.tiny_hub import IDS, WORDS, Tiny, TinyConfig, files_of
from tokenthrift.hub import ConfigError, HubModel, SourceError, WeightsError
from tokenthrift.weights import empty_parameters


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny(TinyConfig(), words=WORDS)


@pytest.fixture
def saved(model: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


# Folders


def test_saved_and_loaded_are_equal(model: Tiny, saved: Path) -> None:
    loaded = Tiny.from_pretrained(saved)
    assert loaded.config == model.config
    assert loaded.words == WORDS
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    assert loaded.head.weight is loaded.embedding.weight


def test_the_folder_holds_plain_files(saved: Path) -> None:
    assert sorted(files_of(saved)) == ["config.json", "model.safetensors", "words/list.txt"]
    fields = json.loads((saved / "config.json").read_text())
    for_transformers = {"model_type": "tokenthrift_tiny", "dtype": "float32"}
    assert fields == {"system": "tiny", "format_version": 2, "width": 4, "words": 6, **for_transformers}
    # The tied matrix is stored once, the unsaved buffer not at all.
    assert sorted(load_file(saved / "model.safetensors")) == ["embedding.weight", "head.bias", "steps"]


def test_half_precision_on_disk_is_full_precision_in_memory(model: Tiny, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert (stored["head.bias"].dtype, stored["steps"].dtype) == (torch.float16, torch.long)
    loaded = Tiny.from_pretrained(tmp_path / "half")
    assert torch.equal(loaded.head.bias, model.head.bias.half().float())
    assert Tiny.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).head.bias.dtype == torch.bfloat16


def test_numbers_too_large_for_half_precision_write_nothing(model: Tiny, tmp_path: Path) -> None:
    with torch.no_grad():
        model.head.bias[0] = 1e6
    with pytest.raises(WeightsError, match="head.bias holds numbers too large"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_keeps_other_files_and_leaves_no_draft(model: Tiny, saved: Path) -> None:
    (saved / "README.md").write_text("the card")
    with torch.no_grad():
        model.head.bias.fill_(7)
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "the card"
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    assert torch.equal(Tiny.from_pretrained(saved).head.bias, torch.full((6,), 7.0))


def test_a_failing_save_leaves_the_old_model(model: Tiny, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(saved)
    monkeypatch.setattr(Tiny, "write_assets", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved)
    assert files_of(saved.parent) == {f"saved/{name}": data for name, data in before.items()}


def test_the_random_state_is_not_touched(saved: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    Tiny.from_pretrained(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(st.integers(1, 64), st.integers(1, 12), st.sampled_from([torch.float16, torch.bfloat16, torch.float64, None]))
@settings(deadline=None, max_examples=10)
def test_every_size_and_precision_round_trips(width: int, words: int, dtype: torch.dtype | None) -> None:
    model = Tiny(TinyConfig(width, words))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, dtype=dtype)
        loaded = Tiny.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        expected = tensor.to(dtype).to(tensor.dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], expected)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10**12}, "within 1 and 64"),
        ({"width": "4"}, "width: expected int, found str '4'"),
        ({"widht": 4}, "unknown field 'widht'; did you mean 'width'"),
        ({"system": "other"}, "system is 'other', but Tiny reads 'tiny'"),
        ({"system": ...}, "system is None"),
        ({"format_version": 3}, "format_version is 3, but this release reads 1 to 2"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": ...}, "format_version is None"),
    ],
)
def test_configurations_that_do_not_fit(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(ConfigError, match=message):
        Tiny.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.bias": None}, "head.bias is missing"),
        ({"head.extra": torch.zeros(1)}, "head.extra is unknown to the model"),
        ({"head.bias": torch.zeros(5)}, r"head.bias is \[5\] in the file and \[6\] in the model"),
        ({"head.bias": torch.zeros(6, dtype=torch.long)}, "head.bias holds integers"),
        ({"steps": torch.zeros(())}, "steps holds floats"),
        ({f"extra.{index}": torch.zeros(1) for index in range(12)}, "extra.0 is unknown.*; and 2 more$"),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {**load_file(saved / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, saved / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        Tiny.from_pretrained(saved)


def test_at_most_ten_tensors_are_named(saved: Path) -> None:
    save_file({f"t{index}": torch.zeros(1) for index in range(1000)}, saved / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        Tiny.from_pretrained(saved)
    assert str(caught.value).count(" is ") == 10


def test_shapes_are_compared_before_memory_is_taken(saved: Path) -> None:
    """Within the ranges of its fields a configuration can still ask for far more than the file holds."""

    class Huge(Tiny):
        def __init__(self, config: TinyConfig, words: tuple[str, ...] = ()) -> None:
            super().__init__(config, words)
            self.table = nn.Linear(10**7, 10**7)  # 400 terabytes

    with pytest.raises(WeightsError, match="table.weight is missing"):
        Huge.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not safetensors at all", b"\xff" * 8 + b"{}"])
def test_files_that_are_not_safetensors(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not a safetensors file, or a damaged one"):
        Tiny.from_pretrained(saved)


def test_a_truncated_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="damaged"):
        Tiny.from_pretrained(saved)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_pickles_are_never_opened(saved: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    (saved / name).write_bytes(bomb)
    Tiny.from_pretrained(saved)  # beside safetensors it is not in the way
    with pytest.raises(WeightsError, match=rf"{name} is a pickled checkpoint.*tokenthrift convert"):
        Tiny.from_pretrained(saved / name)
    (saved / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=rf"{name} is a pickled checkpoint.*tokenthrift convert"):
        Tiny.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes(bomb)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        Tiny.from_pretrained(saved)
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("/nowhere", "there is no folder"),
        ("../sideways", "there is no folder"),
        ("owner/..", "can it be a Hub repository"),
        ("owner/a..b", "can it be a Hub repository"),
        ("a/b/c", "a repository on the Hub is named owner/name"),
        ("alone", "a repository on the Hub is named owner/name"),
        ("~/model", "there is no folder"),
        ("back\\slash/x", "there is no folder"),
        ("", "has no config.json"),
        (Path("owner/name"), "there is no folder 'owner/name'"),
    ],
)
def test_names_that_lead_nowhere(hub: HubServer, source: str | Path, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Tiny.from_pretrained(source)
    assert hub.requests == []


def test_a_file_and_an_incomplete_folder(saved: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json is not a folder; give the folder"):
        Tiny.from_pretrained(saved / "config.json")
    with pytest.raises(SourceError, match=r"a revision \(v1\) needs a Hub repository"):
        Tiny.from_pretrained(saved, revision="v1")
    (saved / "words/list.txt").unlink()
    with pytest.raises(SourceError, match="has no words/list.txt"):
        Tiny.from_pretrained(saved)


# How the memory is filled


class Rotary(HubModel):
    """A language model of transformers, whose rotary frequencies no file holds, beside a table of our own."""

    system = "rotary"
    config_class = TinyConfig
    frequencies: torch.Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        self.lm = LlamaForCausalLM(sizes)
        self.lm.lm_head.weight = self.lm.model.embed_tokens.weight
        self.register_buffer("frequencies", torch.arange(5.0).sin(), persistent=False)


def test_what_no_file_holds_is_exact_after_loading(tmp_path: Path) -> None:
    model = Rotary(TinyConfig()).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = Rotary.from_pretrained(tmp_path / "model")
    names = dict(model.named_buffers())
    assert any("inv_freq" in name for name in names)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, names[name]), name
    assert loaded.lm.lm_head.weight is loaded.lm.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 3]])
    assert torch.equal(model.lm(ids).logits, loaded.lm(ids).logits)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_loading_initializes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rotary(TinyConfig()).save_pretrained(tmp_path / "model")
    drawn: list[torch.device] = []
    normal = torch.Tensor.normal_

    def watched(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(self.device)
        return normal(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", watched)
    Rotary.from_pretrained(tmp_path / "model")
    assert {device.type for device in drawn} <= {"meta"}


def test_precision_and_device_by_name(tmp_path: Path) -> None:
    Tiny(TinyConfig(), WORDS).save_pretrained(tmp_path / "model")
    for name in ("bfloat16", "torch.bfloat16"):
        loaded = Tiny.from_pretrained(tmp_path / "model", dtype=name)
        assert loaded.embedding.weight.dtype == torch.bfloat16
        assert loaded.steps.dtype == torch.long
    places: list[Any] = ["cpu", {"": "cpu"}, *([] if torch.cuda.is_available() else ["auto"])]
    for device_map in places:
        assert Tiny.from_pretrained(tmp_path / "model", device_map=device_map).embedding.weight.device.type == "cpu"
    with pytest.raises(ValueError, match="dtype 'int8'; a model's numbers are float32"):
        Tiny.from_pretrained(tmp_path / "model", dtype="int8")
    with pytest.raises(ValueError, match="device='gpu': these models lie on one device"):
        Tiny.from_pretrained(tmp_path / "model", device="gpu")
    for bad in ("balanced", {"embedding": 0, "head": 1}):
        with pytest.raises(ValueError, match="lie on one device as a whole"):
            Tiny.from_pretrained(tmp_path / "model", device_map=bad)


def test_other_threads_build_real_parameters_meanwhile() -> None:
    made: list[torch.nn.Linear] = []
    with empty_parameters():
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta
