"""Two processes that train together: each image once, the losses of one process, resumed in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from tests import training_runs
from tests.processes import in_this_group, together
from tests.tokenizers.karl.training.training_runs import OPTIM, SIZE, base_of, stage
from tokenthrift.karl.training.base_tokenizer import KarlBaseModule
from tokenthrift.karl.training.data import KarlDataModule
from tokenthrift.training.processes import rank_and_world

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

IMAGES, STEPS = 10, 6  # an epoch is three steps of 4, 4 and 2 images


def train(
    kind: str, pack: Path, folder: Path, batch_size: int, resume: bool = False, steps: int = STEPS
) -> dict[str, Any]:
    """Losses of each step, seeds of its images, weights at the end and the validated figures."""
    torch.manual_seed(0)
    if kind == "base":
        module: Any = KarlBaseModule(base_of("vae"), OPTIM)
    else:
        module = stage(1, "vae", restart_every=0) if kind == "stage 1" else stage(2, "vqgan", restart_every=0)
    notes, trainer = training_runs.fit(
        module,
        KarlDataModule({str(pack): 1}, dev={"d": str(pack)}, size=SIZE, batch_size=batch_size, area=(0.9, 1.0)),
        steps,
        folder=folder,
        every=4,
        resume=folder / "step=4.ckpt" if resume else None,
        attribute="seeds",
        weights_only=False,
        precision="64-true",  # or a gradient that is rounding alone would be a whole step of Adam, either way
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
        **(in_this_group() if rank_and_world()[1] > 1 else {}),
    )
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/l1")}
    return {"losses": notes.losses, "seeds": notes.seen, "weights": weights, "figures": figures}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(0)
    rough = torch.rand(IMAGES, 3, 4, 4, generator=random)
    images = torch.nn.functional.interpolate(rough, (SIZE, SIZE), mode="bilinear")
    path = tmp_path_factory.mktemp("karl") / "images.npy"
    np.save(path, (images * 255).byte().numpy())
    return path


@pytest.mark.parametrize("kind", ["base", "stage 1", "stage 2"])
def test_two_processes_train_as_one_does(kind: str, pack: Path, tmp_path: Path) -> None:
    """Each image once an epoch; the losses, the weights and the validated errors of one process with all images."""
    for name in ("one", "two", "meeting", "again"):
        (tmp_path / name).mkdir()
    alone = train(kind, pack, tmp_path / "one", 4)
    pair = together(tmp_path / "meeting", train, kind, pack, tmp_path / "two", 2)
    for epoch in (slice(0, 3), slice(3, 6)):
        shares = [[seed for step in part["seeds"][epoch] for seed in step] for part in pair]
        assert [len(share) for share in shares] == [IMAGES // 2] * 2
        assert len({*shares[0], *shares[1]}) == IMAGES
    for step in range(STEPS):
        assert {*pair[0]["seeds"][step], *pair[1]["seeds"][step]} == set(alone["seeds"][step])
        # DistributedDataParallel averages what `balanced` has scaled.
        mean = sum(part["losses"][step] for part in pair) / 2
        assert mean == pytest.approx(alone["losses"][step], rel=2e-3)
    assert torch.equal(pair[0]["weights"], pair[1]["weights"])
    torch.testing.assert_close(pair[0]["weights"], alone["weights"], rtol=0, atol=1e-6)
    assert pair[0]["figures"] == pair[1]["figures"]
    assert pair[0]["figures"] == pytest.approx(alone["figures"], rel=2e-3)
    resumed = together(tmp_path / "again", train, kind, pack, tmp_path / "two", 2, True)
    for part, whole in zip(resumed, pair, strict=True):
        assert part["seeds"] == whole["seeds"][4:]
        assert part["losses"] == pytest.approx(whole["losses"][4:], rel=1e-4)


def usage_of_both() -> torch.Tensor:
    """The use of codes after one batch, in which each process has chosen another code."""
    quantizer = stage(1).model.quantizer
    token = torch.nn.functional.normalize(quantizer.codebook.detach(), dim=-1)[distributed.get_rank()]
    quantizer(token[None, None], torch.ones(1, 1, dtype=torch.bool))
    found: torch.Tensor = quantizer.usage
    return found


def test_the_use_of_codes_is_that_of_all_processes(tmp_path: Path) -> None:
    one, other = together(tmp_path, usage_of_both)
    assert torch.equal(one, other)
    assert one[0] == one[1] > one[2]
