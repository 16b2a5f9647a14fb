"""Both stages under Lightning: they learn, resume, start from each other; model and discriminator step in turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.tokenizers.karl.training.training_runs import (
    BATCH,
    SIZE,
    TOKENS,
    Kind,
    Weights,
    base_of,
    fit,
    same,
    smooth_images,
    stage,
)
from tokenthrift.karl.quantizer import CosineQuantizer
from tokenthrift.karl.training import module as training_module
from tokenthrift.karl.training.base_tokenizer import KarlBaseModule
from tokenthrift.karl.training.data import KarlDataModule
from tokenthrift.karl.training.discriminator import PatchDiscriminator
from tokenthrift.training.optim import OptimConfig
from tokenthrift.training.random_state import RandomState
from tokenthrift.training.start_weights import read_start_weights

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth images."""
    return smooth_images(tmp_path_factory.mktemp("karl"))


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_a_base_tokenizer_learns_a_few_images(pack: Path, kind: Kind) -> None:
    torch.manual_seed(0)
    losses = fit(
        KarlBaseModule(base_of(kind), OptimConfig(learning_rate=4e-3, weight_decay=0.0, warmup_steps=5)), pack, steps=40
    ).losses
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize(("number", "kind"), [(1, "vqgan"), (2, "vae")])
def test_a_stage_learns_a_few_images(pack: Path, number: int, kind: Kind) -> None:
    module = stage(number, kind, quantize_start_step=10, halting_weight=0.05)
    losses = fit(module, pack, steps=50).losses
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_stage_1_leaves_the_base_tokenizer_and_stage_2_trains_it(pack: Path, kind: Kind) -> None:
    for number in (1, 2):
        module = stage(number, kind)
        before = {name: tensor.clone() for name, tensor in module.model.base.state_dict().items()}
        fit(module, pack, steps=3)
        moved = {
            name for name, tensor in module.model.base.state_dict().items() if not torch.equal(tensor, before[name])
        }
        assert moved == ({name for name in before if name != "codebook"} if number == 2 else set())


@pytest.mark.parametrize("number", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(pack: Path, tmp_path: Path, number: int) -> None:
    def parts() -> tuple[Any, list[L.Callback]]:
        module = stage(number, quantize_start_step=3)
        module.curriculum.probability.fill_(1 / 19)  # with bins that untrained models reach
        return module, [EMAWeightAveraging(decay=0.9, use_buffers=False), RandomState()]

    whole, callbacks = parts()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    losses = fit(whole, pack, *callbacks, saving, steps=10).losses
    resumed, callbacks = parts()
    rest = fit(resumed, pack, *callbacks, steps=10, resume=tmp_path / "step=5.ckpt").losses
    assert rest == losses[5:]
    assert same(resumed, whole)
    # The published curriculum is no buffer: it would have started anew.
    assert whole.curriculum.probability.std() > 1e-4


def test_the_average_of_the_weights_survives_epochs(pack: Path) -> None:
    """The published one is set to the live weights at the start of every epoch."""
    module = stage(1)
    first = module.model.to_tokens.weight.detach().clone()
    weights = Weights()
    fit(module, pack, weights, EMAWeightAveraging(decay=0.8, use_buffers=False), max_epochs=4)
    live = weights.values
    assert len(live) == 8, "two steps an epoch"
    average = live[0]  # torch's average starts with the first weights that it is given
    for weight in live[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(module.model.to_tokens.weight.detach(), average)
    assert not torch.equal(first, live[0])


@pytest.fixture
def small_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator that 16 px are enough for."""
    monkeypatch.setattr(training_module, "PatchDiscriminator", partial(PatchDiscriminator, 16, 1))


@pytest.mark.usefixtures("small_discriminator")
def test_generator_and_discriminator_have_an_optimiser_each_and_step_in_turn(pack: Path) -> None:
    """Published: the generator's optimizer holds the discriminators too, which step eight times as often."""
    module = stage(2, adversarial={0: 0.5})
    steps: list[str] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            model = {id(p) for p in pl_module.model.parameters()}
            theirs = {id(p) for p in pl_module.discriminator.parameters()}
            assert held <= model or held == theirs
            steps.append("discriminator" if held == theirs else "generator")
            if held == theirs:
                self.model = [p.detach().clone() for p in pl_module.model.parameters()]
            else:
                self.discriminator = [p.detach().clone() for p in pl_module.discriminator.parameters()]
                grads = [p.grad for p in pl_module.discriminator.parameters()]
                assert steps or all(grad is None for grad in grads), "the generator's loss leaves none behind"

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert all(torch.equal(a, b) for a, b in zip(self.model, pl_module.model.parameters(), strict=True))
            pairs = zip(self.discriminator, pl_module.discriminator.parameters(), strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs)

    fit(module, pack, Watch(), max_epochs=2)
    assert steps == ["generator", "discriminator"] * 4


@pytest.mark.usefixtures("small_discriminator")
def test_steps_are_batches_also_with_a_discriminator(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning counts the steps of every optimizer: schedule and limit would part, and restarts be skipped."""
    module = stage(2, adversarial={1: 0.5}, quantize_start_step=3, restart_every=4)
    seen: list[tuple[int, float]] = []

    def restart(self: CosineQuantizer, tokens: Tensor, mask: Tensor, threshold: float) -> int:
        seen.append((module.global_step, threshold))
        return 0

    monkeypatch.setattr(CosineQuantizer, "restart", restart)
    assert len(fit(module, pack, steps=8).losses) == module.global_step == 8
    assert seen == [(3, float("inf")), (4, 0.03), (8, 0.03)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in module.trainer.optimizers]
    assert max(rates) < 1e-4, "both cosines have ended"


@pytest.mark.usefixtures("small_discriminator")
def test_the_adversarial_loss_joins_at_its_epoch(pack: Path) -> None:
    module = stage(2, adversarial={1: 0.2, 3: 0.8})
    weights: list[float] = []

    class AdversarialWeights(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            weights.append(pl_module.adversarial_weight)

    fit(module, pack, AdversarialWeights(), max_epochs=4)
    assert weights == [0.0, 0.2, 0.2, 0.8]


def test_validation_logs_by_name_and_draws_reconstructions(pack: Path, tmp_path: Path) -> None:
    logger, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "board")
    fit(stage(1), pack, steps=2, logger=[board, logger], validate=True)
    events = EventAccumulator(board.log_dir, {"images": 0}).Reload()
    assert "val/smooth" in events.Tags()["images"]
    assert "val/l1_smooth" in events.Tags()["scalars"]
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/l1_smooth", "val/tokens_smooth", "val/missed_smooth", f"val/l1_{TOKENS}_smooth"} <= set(header)
    assert {"train/perplexity", "train/achieved_error", "train/count_error"} <= set(header)
    (path,) = (Path(logger.log_dir) / "images").glob("val-smooth-*.png")
    assert Image.open(path).size == (4 * SIZE + 5 * 2, 5 * SIZE + 6 * 2), "originals, three counts, the target error"


@pytest.mark.parametrize("kind", ["base", "stage"])
def test_test_images_are_evaluated_like_development_images(pack: Path, kind: str) -> None:
    module = stage(1) if kind == "stage" else KarlBaseModule(base_of("vae"))
    data = KarlDataModule({}, dev={"smooth": str(pack)}, test={"unseen": str(pack)}, size=SIZE, batch_size=BATCH)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    assert "val/l1_smooth" in validated
    assert tested == {name.replace("val/", "test/").replace("smooth", "unseen"): v for name, v in validated.items()}


def test_each_stage_starts_from_the_one_before(pack: Path, tmp_path: Path) -> None:
    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, name, every_n_train_steps=2)

    torch.manual_seed(1)
    base = KarlBaseModule(base_of("vae"))
    fit(base, pack, saving("base"), steps=2)
    first = stage(1, base_from=str(tmp_path / "base.ckpt"))
    assert same(first.model.base, base.base)
    fit(first, pack, saving("first"), steps=2)
    second = stage(2, start_from=str(tmp_path / "first.ckpt"))
    assert same(second.model, first.model)
    second.model.save_pretrained(tmp_path / "model")
    assert read_start_weights(tmp_path / "model").tensors.keys() == {
        f"model.{name}" for name in second.model.state_dict()
    }
    assert same(stage(1, base_from=str(tmp_path / "model")).model.base, second.model.base)
