"""Folders and repositories of models, with the real client against a local Hub."""

import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.hub_server import TOKEN, HubServer, Repository
from tokenthrift.hub import ConfigError, HubModel, SourceError, WeightsError, push_folder


@dataclass(frozen=True)
class TinyConfig:
    width: int = 4
    words: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 64:
            raise ConfigError(f"width must be within 1 and 64, not {self.width}")


class Tiny(HubModel):
    """Tied weights, an integer buffer, a buffer that is not saved, and an asset: what real models have."""

    system = "tiny"
    config_class = TinyConfig
    asset_files: ClassVar[tuple[str, ...]] = ("words/list.txt",)
    config: TinyConfig
    steps: Tensor
    scale: Tensor

    def __init__(self, config: TinyConfig, words: tuple[str, ...] = ()) -> None:
        super().__init__(config)
        self.words = words
        self.embedding = nn.Embedding(config.words, config.width)
        self.head = nn.Linear(config.width, config.words)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        return {"words": tuple((folder / "words/list.txt").read_text().split())}

    def write_assets(self, folder: Path) -> None:
        (folder / "words").mkdir()
        (folder / "words/list.txt").write_text("\n".join(self.words))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.head(self.embedding(ids))  # type: ignore[no-any-return]


class Other(Tiny):
    system = "other"


WORDS = ("one", "two")
IDS = torch.tensor([[0, 3, 5]])


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny(TinyConfig(), words=WORDS)


@pytest.fixture
def saved(model: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert fields == {"system": "tiny", "format_version": 1, "width": 4, "words": 6}
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
        ({"format_version": 2}, "format_version is 2, but this release reads 1"),
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


# The Hub


def test_download_cache_and_offline_reuse(hub: HubServer, model: Tiny, saved: Path) -> None:
    hub.add("org/tiny", {**files_of(saved), "README.md": b"# card", "training.log": b"long"})
    first = Tiny.from_pretrained("org/tiny")
    assert torch.equal(first(IDS), model.eval()(IDS))
    fetched = {request.rsplit("/", 1)[-1] for request in hub.requests if request.startswith("GET")}
    assert fetched == {"config.json", "model.safetensors", "list.txt"}

    hub.requests.clear()
    Tiny.from_pretrained("org/tiny", local_files_only=True)
    assert hub.requests == []

    hub.stop()
    assert torch.equal(Tiny.from_pretrained("org/tiny")(IDS), first(IDS))


def test_what_is_not_cached_cannot_be_had_offline(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
    hub.add("org/tiny", files_of(saved))
    with pytest.raises(SourceError, match="not in the cache and the network was not asked"):
        Tiny.from_pretrained("org/tiny", local_files_only=True)
    assert hub.requests == []
    hub.stop()
    with pytest.raises(SourceError, match="not in the cache and the Hub could not be reached"):
        Tiny.from_pretrained("org/tiny")


def test_cache_dir_is_used(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.add("org/tiny", files_of(saved))
    Tiny.from_pretrained("org/tiny", cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--org--tiny").is_dir()
    with pytest.raises(SourceError, match="not in the cache"):
        Tiny.from_pretrained("org/tiny", local_files_only=True)


def test_revisions(hub: HubServer, model: Tiny, saved: Path) -> None:
    old = hub.add("org/tiny", files_of(saved))
    with torch.no_grad():
        model.head.bias.fill_(9)
    model.save_pretrained(saved)
    hub.add("org/tiny", files_of(saved))
    assert Tiny.from_pretrained("org/tiny").head.bias[0] == 9
    assert Tiny.from_pretrained("org/tiny", revision=old).head.bias[0] != 9
    with pytest.raises(SourceError, match="org/tiny has no revision 'v9'"):
        Tiny.from_pretrained("org/tiny", revision="v9")


def test_a_branch_that_moves_during_the_download_is_not_mixed(
    hub: HubServer, model: Tiny, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", files_of(saved))
    weights = load_file(saved / "model.safetensors")
    resolve = Repository.resolve

    def resolve_and_move(self: Repository, revision: str) -> str | None:
        found = resolve(self, revision)
        self.commit({"model.safetensors": b"of a later commit"})
        return found

    monkeypatch.setattr(Repository, "resolve", resolve_and_move)
    assert torch.equal(Tiny.from_pretrained("org/tiny").head.bias, weights["head.bias"])


def test_an_unknown_and_a_private_repository(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/secret", files_of(saved), private=True)
    monkeypatch.delenv("HF_TOKEN")
    for name in ("org/unknown", "org/secret"):
        with pytest.raises(SourceError, match=rf"no folder '{name}' here and no such repository on the Hub"):
            Tiny.from_pretrained(name)
    assert Tiny.from_pretrained("org/secret", token=TOKEN).words == WORDS


def test_the_wrong_kind_of_file_in_a_repository(hub: HubServer, saved: Path) -> None:
    pickled = {"config.json": (saved / "config.json").read_bytes(), "pytorch_model.bin": b"\x80\x04N."}
    hub.add("org/pickled", pickled)
    with pytest.raises(WeightsError, match="org/pickled/pytorch_model.bin is a pickled checkpoint"):
        Tiny.from_pretrained("org/pickled")
    assert not any(request.startswith("GET") and "pytorch_model.bin" in request for request in hub.requests)
    hub.add("org/only-pickle", {"model.ckpt": b"\x80\x04N."})
    with pytest.raises(WeightsError, match="org/only-pickle has no config.json.*model.ckpt is a pickled checkpoint"):
        Tiny.from_pretrained("org/only-pickle")
    hub.add("org/other", {"README.md": b"# hello"})
    with pytest.raises(SourceError, match="org/other has no config.json: it is not a model of Tokenthrift"):
        Tiny.from_pretrained("org/other")


def test_weights_of_another_system_are_not_downloaded(hub: HubServer, saved: Path) -> None:
    hub.add("org/tiny", files_of(saved))
    with pytest.raises(ConfigError, match="system is 'tiny', but Other reads 'other'"):
        Other.from_pretrained("org/tiny")
    assert not any("model.safetensors" in request for request in hub.requests)


def test_push_creates_uploads_and_loads_back(hub: HubServer, model: Tiny) -> None:
    address = model.push_to_hub("tester/tiny", private=True, commit_message="First", dtype=torch.float16)
    repository = hub.repositories["tester/tiny"]
    assert repository.private
    assert address.endswith(repository.branches["main"])
    assert sorted(repository.commits[repository.branches["main"]]) == [
        "config.json",
        "model.safetensors",
        "words/list.txt",
    ]
    loaded = Tiny.from_pretrained("tester/tiny")
    assert loaded.words == WORDS
    assert torch.equal(loaded.head.bias, model.head.bias.half().float())

    with torch.no_grad():
        model.head.bias.fill_(3)
    model.push_to_hub("tester/tiny", revision="next")
    assert Tiny.from_pretrained("tester/tiny", revision="next").head.bias[0] == 3
    assert Tiny.from_pretrained("tester/tiny").head.bias[0] != 3


def test_push_folder_takes_the_card_and_leaves_hidden_files(hub: HubServer, saved: Path) -> None:
    (saved / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (saved / ".env").write_text("SECRET=1")
    (saved / "words" / ".swap").write_text("x")
    push_folder(saved, "tester/tiny")
    repository = hub.repositories["tester/tiny"]
    uploaded = repository.commits[repository.branches["main"]]
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors", "words/list.txt"]
    assert uploaded["README.md"] == (saved / "README.md").read_bytes()


def test_what_is_not_pushed(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="cannot upload to a..b"):
        push_folder(saved, "a..b")
    with pytest.raises(SourceError, match="there is no folder 'org/tiny' to upload"):
        push_folder("org/tiny", "tester/tiny")
    (saved / "last.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match="never uploaded: last.ckpt"):
        push_folder(saved, "tester/tiny")
    (saved / "last.ckpt").unlink()
    with pytest.raises(SourceError, match="cannot upload to tester/tiny"):
        push_folder(saved, "tester/tiny", token="hf_wrong")
    assert hub.repositories == {}
