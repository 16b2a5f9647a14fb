"""Two processes that train Llama-MTSK together: each clip once, losses as of one process, a resume, missing streams."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import distributed

from tests import training_runs
from tests.asr.talking import write_parts, write_states
from tests.processes import in_this_group, together
from tokenthrift.mtsk import MtskDataModule, MtskModule
from tokenthrift.mtsk.training import data as data_file
from tokenthrift.mtsk.training.assembly import AssemblyConfig
from tokenthrift.mtsk.training.processes import common_streams
from tokenthrift.training.optim import OptimConfig
from tokenthrift.training.sampler import Epoch, ResumableBatchSampler, bucketed_epoch

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
# Of unequal lengths, so that the two processes have unequal numbers of clips and of tokens.
TEXTS = [" ".join(["dog", "a", "fox"][: 1 + i % 3]) + "x" * (i // 3) for i in range(15)]
FRAMES = 100
STEPS = 5


def fit(
    root: Path, train: str, options: dict[str, Any], resume: str | None = None, group: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One run: its texts, losses, validation figures and final weights."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"audio_rates": (2, 6), "video_rates": (1, 3), "bottleneck": 4, "projector_hidden_size": 16}
    parts = json.loads((root / "parts.json").read_text())
    config = AssemblyConfig(**parts, **own, **options["config"])
    module = MtskModule(config, OptimConfig(learning_rate=4e-3, warmup_steps=1), scales_per_step=options["scales"])
    notes, trainer = training_runs.fit(
        module,
        MtskDataModule(str(root / train), str(root / "dev"), max_frames=options.get("frames", FRAMES), seed=4),
        options.get("steps", STEPS),
        folder=root / options["checkpoints"],
        every=2,
        resume=resume,
        attribute="texts",
        **(group or {}),
    )
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    figures = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"texts": notes.seen, "losses": notes.losses, "weights": trained, "figures": figures}


def fit_in_group(root: Path, train: str, options: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """One run as a member of a group."""
    return fit(root, train, options, resume, in_this_group())


def global_batches(lengths: list[int], max_total: int, *, seed: int, bucket: int) -> ResumableBatchSampler:
    """For one process, the batches that two share."""

    def epoch_of(epoch: int, world: int) -> Epoch:
        two = bucketed_epoch(lengths, max_total, 2, random.Random(f"{seed}-{epoch}"), bucket)
        return Epoch(two.order, two.ends[1::2], 1)

    return ResumableBatchSampler(epoch_of)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "parts.json").write_text(json.dumps(write_parts(folder)))
    write_states(folder / "train" / "0.safetensors", TEXTS)
    write_states(folder / "dev" / "0.safetensors", ["the lazy dog", "a fox", "no"])
    rows = []
    for i, text in enumerate(["a fox", "no", "dog", "one"]):
        sound = torch.randn(4_000, generator=torch.Generator().manual_seed(i)).mul(0.1).clamp(-1, 1)
        soundfile.write(folder / f"{i}.flac", sound.numpy(), 16_000)
        rows.append(json.dumps({"audio_filepath": f"{i}.flac", "text": text, "duration": 0.25}) + "\n")
    (folder / "1.flac").write_bytes(b"no sound")
    (folder / "clips.jsonl").write_text("".join(rows))
    return folder


@pytest.mark.parametrize(("strategy", "scales"), [("MS", None), ("SS", 2)])
def test_two_processes_train_as_one_and_resume(
    strategy: str, scales: int | None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("whole", "rest"):
        (tmp_path / folder).mkdir()
    options: dict[str, Any] = {"config": {"strategy": strategy}, "scales": scales, "checkpoints": f"{strategy}-two"}
    whole = together(tmp_path / "whole", fit_in_group, root, "train", options)
    pairs = list(zip(*(member["texts"] for member in whole), strict=True))
    assert len(pairs) == STEPS
    assert any(len(one) != len(two) for one, two in pairs)

    monkeypatch.setattr(data_file, "bucketed_batches", global_batches)
    alone = fit(root, "train", options | {"checkpoints": f"{strategy}-one"})
    assert [[*one, *two] for one, two in pairs] == alone["texts"]
    for member in whole:
        # Later losses follow from the gradients before, so equal losses are equal gradients.
        assert member["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert member["figures"] == pytest.approx(alone["figures"], rel=1e-3), "over all clips, not a mean of two means"
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(member["weights"][name], weight, rtol=1e-2, atol=1e-4, msg=name)
    assert all(torch.equal(whole[0]["weights"][name], weight) for name, weight in whole[1]["weights"].items())
    monkeypatch.undo()

    # Killed in the middle of the first epoch: what a process has not done by then, it does on resuming.
    checkpoint = str(root / f"{strategy}-two" / "step=2.ckpt")
    options["checkpoints"] = f"{strategy}-rest"
    rest = together(tmp_path / "rest", fit_in_group, root, "train", options, checkpoint)
    for before, after in zip(whole, rest, strict=True):
        assert after["texts"] == before["texts"][2:]
        assert after["losses"] == before["losses"][2:]
        for name, weight in before["weights"].items():
            assert torch.equal(after["weights"][name], weight)


def test_a_process_with_nothing_to_read_stops_no_other(root: Path, tmp_path: Path) -> None:
    """One of four clips is broken and is a batch of its own, so that its process has nothing in that step."""
    options: dict[str, Any] = {
        "config": {"tasks": ("asr",), "avhubert": None},
        "scales": None,
        "checkpoints": "broken",
        "steps": 4,
        "frames": 1,
    }
    parts = json.loads((root / "parts.json").read_text())
    alone = root / "sound"
    alone.mkdir()
    (alone / "parts.json").write_text(json.dumps({name: part for name, part in parts.items() if name != "avhubert"}))
    for file in (*root.glob("*.flac"), root / "clips.jsonl"):
        (alone / file.name).write_bytes(file.read_bytes())
    (alone / "dev").symlink_to(root / "dev")
    one, two = together(tmp_path, fit_in_group, alone, "clips.jsonl", options)
    assert one["losses"] == two["losses"]
    assert None not in one["losses"]
    assert Counter(map(len, one["texts"] + two["texts"])) == {1: 6, 0: 2}
    assert all(torch.equal(one["weights"][name], weight) for name, weight in two["weights"].items())


def seen_in_group(root: Path) -> list[list[str]]:
    """The texts of three epochs of this process."""
    data = MtskDataModule(str(root / "train"), str(root / "dev"), max_frames=FRAMES)
    data.setup("fit")
    loader = data.train_dataloader()
    return [[text for batch in loader for text in batch.texts] for _ in range(3)]


def test_processes_share_every_epoch_out(root: Path, tmp_path: Path) -> None:
    one, two = together(tmp_path, seen_in_group, root)
    for mine, theirs in zip(one, two, strict=True):
        assert Counter(mine + theirs) == Counter(TEXTS)
        assert mine
        assert theirs
    assert one[0] != one[1]


def streams_in_group() -> list[bool]:
    """The common streams where process 0 has both and process 1 only sound."""
    return list(common_streams(True, distributed.get_rank() == 0, torch.device("cpu")))


def test_a_step_uses_the_streams_that_all_processes_have(tmp_path: Path) -> None:
    """As one process would, whose batch lacks a stream that any of its clips lacks."""
    assert together(tmp_path, streams_in_group) == [[True, False]] * 2
    assert common_streams(True, False, torch.device("cpu")) == (True, False)
