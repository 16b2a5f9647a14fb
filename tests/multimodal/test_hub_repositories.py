"""Repositories of models, with the real client against a local Hub."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hub_server import TOKEN, HubServer, Repository
from tests.multimodal.tiny_hub import IDS, WORDS, Tiny, TinyConfig, files_of
from tokenthrift.hub import ConfigError, SourceError, WeightsError, push_folder
from tokenthrift.sources import fetch_weights


class Other(Tiny):
    system = "other"


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny(TinyConfig(), words=WORDS)


@pytest.fixture
def saved(model: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    return folder


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


def test_shards_are_of_the_commit_of_their_index(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the branch moves with every request; shards without a needed tensor are not fetched."""
    shards = {"a.x": "1.safetensors", "a.y": "2.safetensors", "b": "3.safetensors"}
    resolve = Repository.resolve

    def files(version: int) -> dict[str, bytes]:
        held = dict.fromkeys(shards.values(), str(version).encode())
        return {"model.safetensors.index.json": json.dumps({"weight_map": shards}).encode(), **held}

    def resolve_and_move(self: Repository, revision: str) -> str | None:
        found = resolve(self, revision)
        self.commit(files(len(self.commits)))
        return found

    hub.add("org/shards", files(0))
    monkeypatch.setattr(Repository, "resolve", resolve_and_move)
    paths = fetch_weights("org/shards", "a.")
    assert [path.name for path in paths] == ["1.safetensors", "2.safetensors"]
    assert (paths[0].parent / "model.safetensors.index.json").is_file()
    assert paths[0].read_text() == paths[1].read_text()
    assert not any("3.safetensors" in request for request in hub.requests)


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
