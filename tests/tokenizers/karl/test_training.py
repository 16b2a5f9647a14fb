"""Both stages under Lightning: they learn, resume exactly, and repeat none of the published training's mistakes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, distributed, nn

from tokenthrift.karl.base_module import KarlBaseModule
from tokenthrift.karl.data import KarlDataModule
from tokenthrift.karl.discriminator import PatchDiscriminator
from tokenthrift.karl.losses import Lpips
from tokenthrift.karl.module import KarlStage1Module, KarlStage2Module, pyramid
from tokenthrift.karl.quantiser import CosineQuantiser
from tokenthrift.karl.stage import KarlModule, trained_weights
from tokenthrift.training.random_state import RandomState

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
SIZE, BATCH, TOKENS = 16, 4, 8
Kind = Literal["vqgan", "vae"]


def base_of(kind: Kind) -> dict[str, Any]:
    sizes = {"patch": 2, "channels": 16, "multipliers": [1, 1], "blocks": 1, "latent": 8, "groups": 4, "codes": 16}
    return {"kind": kind, **sizes, "scale": 1.0}


def model_of(kind: Kind = "vae", **changes: Any) -> dict[str, Any]:
    half = {"width": 32, "layers": 1, "heads": 2}
    sizes = {"grid": [4, 4], "max_tokens": TOKENS, "table": TOKENS, "token_width": 6, "codes": 32}
    return {"base": base_of(kind), "encoder": half, "decoder": half, **sizes, **changes}


def stage(number: int, kind: Kind = "vae", **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"learning_rate": 3e-3, "warmup_steps": 1, "count_step": 1, "restart_every": 4}
    if number == 2:
        settings["lpips_weight"] = 0.0
    kinds: dict[int, Any] = {1: KarlStage1Module, 2: KarlStage2Module}
    return kinds[number](options.pop("model", model_of(kind)), **{**settings, **options})


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth images."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(8, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(rough, (SIZE, SIZE), mode="bilinear")
    path = tmp_path_factory.mktemp("karl") / "images.npy"
    np.save(path, (images * 255).byte().numpy())
    return path


class Notes(L.Callback):
    """Notes a number of every step, and the weights after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if isinstance(pl_module, KarlModule):
            self.weights.append(pl_module.model.to_tokens.weight.detach().clone())


def fit(
    module: L.LightningModule,
    pack: Path,
    *callbacks: L.Callback,
    steps: int = -1,
    epochs: int = -1,
    resume: Path | None = None,
    logger: Any = False,
    validate: bool = False,
) -> Notes:
    notes = Notes()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=epochs,
        callbacks=[notes, *callbacks],
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1 if validate else 0,
        log_every_n_steps=1,
    )
    data = KarlDataModule(
        {str(pack): 1}, dev={"smooth": str(pack)}, size=SIZE, batch_size=BATCH, area=(0.9, 1.0), dev_images=4
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return notes


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_a_base_tokenizer_learns_a_few_images(pack: Path, kind: Kind) -> None:
    torch.manual_seed(0)
    losses = fit(KarlBaseModule(base_of(kind), learning_rate=4e-3, warmup_steps=5), pack, steps=40).losses
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize(("number", "kind"), [(1, "vqgan"), (2, "vae")])
def test_a_stage_learns_a_few_images(pack: Path, number: int, kind: Kind) -> None:
    module = stage(number, kind, quantise_from=10, halting_weight=0.05)
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
        module = stage(number, quantise_from=3)
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
    live = fit(module, pack, EMAWeightAveraging(decay=0.8, use_buffers=False), epochs=4).weights
    assert len(live) == 8, "two steps an epoch"
    average = live[0]  # torch's average starts with the first weights that it is given
    for weight in live[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(module.model.to_tokens.weight.detach(), average)
    assert not torch.equal(first, live[0])


def test_every_image_is_given_a_count_of_its_own(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published training draws one for the batch."""
    seen: list[Tensor] = []
    whole = KarlStage1Module.first_pass

    def spy(self: KarlModule, images: Tensor, features: Tensor, counts: Tensor) -> Any:
        seen.append(counts)
        return whole(self, images, features, counts)

    monkeypatch.setattr(KarlStage1Module, "first_pass", spy)
    fit(stage(1), pack, steps=10)
    assert sum(len(counts.unique()) > 1 for counts in seen) >= 9
    assert min(int(c.min()) for c in seen) >= 1
    assert max(int(c.max()) for c in seen) <= TOKENS


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_pass_over_a_batch_is_the_passes_over_its_images(attention: str) -> None:
    """The published masks belong to the wrong images wherever there is more than one."""
    halting = "prefix" if attention == "causal" else "subset"
    module = stage(1, model=model_of(latent_attention=attention, halting=halting)).eval()
    with torch.no_grad():
        module.model.halting.mlp[2].weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        features = module.model.base.encode(images)
        errors = torch.tensor([0.02, 0.1, 0.3])
        together = module.second_pass(images, features, errors)
        assert together.keep.sum() < together.keep.numel(), "some tokens are halted"
        for i in range(3):
            one = slice(i, i + 1)
            alone = module.second_pass(images[one], features[one], errors[one])
            assert torch.equal(alone.keep, together.keep[one])
            torch.testing.assert_close(alone.output, together.output[one], rtol=0, atol=1e-5)


def test_the_wanted_error_acts_from_the_first_step() -> None:
    module = stage(1).eval()
    images = torch.rand(1, 3, SIZE, SIZE)
    features = module.model.base.encode(images)
    outputs = [module.second_pass(images, features, torch.tensor([e])).output for e in (0.02, 0.3)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.fixture
def small_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator that 16 px are enough for."""
    monkeypatch.setattr("tokenthrift.karl.module.PatchDiscriminator", partial(PatchDiscriminator, 16, 1))


@pytest.mark.usefixtures("small_judge")
def test_generator_and_discriminator_have_an_optimiser_each_and_step_in_turn(pack: Path) -> None:
    """Published: the generator's optimiser holds the discriminators too, which step eight times as often."""
    module = stage(2, adversarial={0: 0.5})
    steps: list[str] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            model = {id(p) for p in pl_module.model.parameters()}
            judge = {id(p) for p in pl_module.discriminator.parameters()}
            assert held <= model or held == judge
            steps.append("discriminator" if held == judge else "generator")
            if held == judge:
                self.model = [p.detach().clone() for p in pl_module.model.parameters()]
            else:
                self.judge = [p.detach().clone() for p in pl_module.discriminator.parameters()]
                grads = [p.grad for p in pl_module.discriminator.parameters()]
                assert steps or all(grad is None for grad in grads), "the generator's loss leaves none behind"

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert all(torch.equal(a, b) for a, b in zip(self.model, pl_module.model.parameters(), strict=True))
            pairs = zip(self.judge, pl_module.discriminator.parameters(), strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs)

    fit(module, pack, Watch(), epochs=2)
    assert steps == ["generator", "discriminator"] * 4


@pytest.mark.usefixtures("small_judge")
def test_steps_are_batches_also_with_a_discriminator(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning counts the steps of every optimiser: schedule and limit would part, and restarts be skipped."""
    module = stage(2, adversarial={1: 0.5}, quantise_from=3, restart_every=4)
    seen: list[tuple[int, float]] = []

    def restart(self: CosineQuantiser, tokens: Tensor, mask: Tensor, threshold: float) -> int:
        seen.append((module.global_step, threshold))
        return 0

    monkeypatch.setattr(CosineQuantiser, "restart", restart)
    assert len(fit(module, pack, steps=8).losses) == module.global_step == 8
    assert seen == [(3, float("inf")), (4, 0.03), (8, 0.03)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in module.trainer.optimizers]
    assert max(rates) < 1e-4, "both cosines have ended"


@pytest.mark.usefixtures("small_judge")
def test_the_adversarial_loss_joins_at_its_epoch(pack: Path) -> None:
    module = stage(2, adversarial={1: 0.2, 3: 0.8})
    weights: list[float] = []

    class Weights(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            weights.append(pl_module.adversarial_weight)

    fit(module, pack, Weights(), epochs=4)
    assert weights == [0.0, 0.2, 0.2, 0.8]


def test_lpips_is_given_images_between_minus_one_and_one() -> None:
    """The published code gives it [0, 1]."""
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, made: Tensor, images: Tensor) -> Tensor:
            seen.extend([made, images])
            return (made - images).abs().mean((1, 2, 3), keepdim=True)

    lpips = Lpips.__new__(Lpips)
    nn.Module.__init__(lpips)
    lpips.net = Net()
    assert lpips(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).tolist() == [2.0, 2.0]
    assert [(t.min().item(), t.max().item()) for t in seen] == [(-1, -1), (1, 1)]
    assert not lpips.train().training


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_grids_need_not_be_square(kind: Kind) -> None:
    """The published VQGAN path works for 16 x 16 cells of 256 channels only."""
    module = stage(1, kind, model=model_of(kind, grid=[2, 6]))
    images = torch.rand(2, 3, 8, 24)
    features = module.model.base.encode(images)
    assert features.shape[2:] == (2, 6), "as many cells as no square has"
    one = module.first_pass(images, features, torch.tensor([3, 5]))
    assert module.decoded(one, features).shape == images.shape
    assert module.distillation_loss(one.output, features).isfinite()


def test_dead_codes_move_onto_tokens(pack: Path) -> None:
    module = stage(1, restart_every=5, restart_below=0.9)
    with torch.no_grad():
        module.model.quantiser.usage[:30] = 0
    before = module.model.quantiser.codebook.detach().clone()
    fit(module, pack, steps=5)
    after = nn.functional.normalize(module.model.quantiser.codebook.detach(), dim=1)
    offered = nn.functional.normalize(module.offered, dim=1)
    moved = (after @ offered.T).max(1).values > 1 - 1e-5
    assert moved[:30].sum() >= 25
    assert not torch.equal(before, module.model.quantiser.codebook)


def test_tokens_stay_continuous_at_first_and_the_codebook_is_laid_onto_them(pack: Path) -> None:
    module = stage(1, quantise_from=3, restart_every=0)
    before = module.model.quantiser.codebook.detach().clone()
    fit(module, pack, steps=2)
    assert torch.equal(before, module.model.quantiser.codebook), "not used yet"
    module = stage(1, quantise_from=3, restart_every=0)
    fit(module, pack, steps=3)
    torch.testing.assert_close(module.model.quantiser.codebook.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize(("grid", "levels"), [((4, 4), [1, 4, 16]), ((2, 4), [1, 4, 8]), ((1, 1), [1])])
def test_a_pyramid_goes_from_the_whole_to_the_cells(grid: tuple[int, int], levels: list[int]) -> None:
    features = torch.randn(2, 3, *grid)
    means = pyramid(features, 99)
    assert means.shape == (2, sum(levels), 3)
    torch.testing.assert_close(means[:, 0], features.mean((2, 3)))
    torch.testing.assert_close(means[:, -levels[-1] :], features.flatten(2).transpose(1, 2))
    assert torch.equal(pyramid(features, 3), means[:, :3])


def test_tokens_are_guided_by_the_pyramid_first(pack: Path) -> None:
    module = stage(1, model=model_of(max_tokens=21, table=21), guide_until=40, second_from=41)
    taught: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            taught.append(float(trainer.callback_metrics["train/taught"]))

    fit(module, pack, Watch(), steps=40)
    directions = nn.functional.normalize(module.components)
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), rtol=0, atol=1e-3)
    assert sum(taught[-5:]) < 0.7 * sum(taught[:5])
    assert module.curriculum.probability.max() < 0.3, "no second pass, no curriculum"


def test_validation_logs_by_name_and_draws_reconstructions(pack: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(stage(1), pack, steps=2, logger=logger, validate=True)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/l1_smooth", "val/tokens_smooth", "val/missed_smooth", f"val/l1_{TOKENS}_smooth"} <= set(header)
    assert {"train/perplexity", "train/reached", "train/count_error"} <= set(header)
    (path,) = (Path(logger.log_dir) / "pictures").glob("val-smooth-*.png")
    assert Image.open(path).size == (4 * SIZE + 3 * 2, 5 * SIZE + 4 * 2), "originals, three counts, the wanted error"


@pytest.mark.parametrize("kind", ["base", "stage"])
def test_test_images_are_judged_like_development_images(pack: Path, kind: str) -> None:
    module = stage(1) if kind == "stage" else KarlBaseModule(base_of("vae"))
    data = KarlDataModule({}, dev={"smooth": str(pack)}, test={"unseen": str(pack)}, size=SIZE, batch_size=BATCH)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    assert "val/l1_smooth" in validated
    assert tested == {name.replace("val/", "test/").replace("smooth", "unseen"): v for name, v in validated.items()}


class Stepped(KarlStage1Module):
    """Without a trainer."""

    global_step: Any = 0


def restarted(rank: int, module: Stepped, folder: Path) -> None:
    """Lays a codebook onto tokens of this process, moves dead codes, and saves what came of it as `RANK.pt`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    quantiser = module.model.quantiser
    assert quantiser is not None
    torch.manual_seed(1 + rank)
    module.offer(torch.randn(32, 6))
    module.global_step = 2
    module.on_train_batch_end(None, None, 1)
    found = {"offered": module.offered, "laid": quantiser.codebook.detach().clone()}
    quantiser.usage[: 4 + rank] = 0
    module.global_step = 4
    module.on_train_batch_end(None, None, 3)
    torch.save({**found, "moved": quantiser.codebook.detach(), "usage": quantiser.usage}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_codes_move_to_the_same_places_in_every_process(tmp_path: Path) -> None:
    """Otherwise the processes train different models from the first restart on."""
    module = Stepped(model_of("vae"), restart_every=4, quantise_from=2)
    context = torch.multiprocessing.get_context("fork")  # a new interpreter would take seconds to import everything
    processes = [context.Process(target=restarted, args=(rank, module, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(one["offered"], other["offered"])
    for name in ("laid", "usage", "moved"):
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["laid"], one["moved"])


def test_extreme_counts_are_asked_for_other_errors(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code has the paper's augmentation, and no longer calls it."""
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    answers, second = KarlModule.answers, KarlModule.second_pass

    def spy(self: KarlModule, counts: Tensor, reached: Tensor) -> Tensor:
        asked.append((counts, reached, reached))
        return answers(self, counts, reached)

    def pass_spy(self: KarlModule, images: Tensor, features: Tensor, errors: Tensor) -> Any:
        asked[-1] = (*asked[-1][:2], errors)
        return second(self, images, features, errors)

    monkeypatch.setattr(KarlModule, "answers", spy)
    monkeypatch.setattr(KarlModule, "second_pass", pass_spy)
    fit(stage(1, exchange=1.0, count_step=4), pack, steps=4)  # 4 or 8 tokens: the fewest or the most
    counts, reached, errors = map(torch.cat, zip(*asked, strict=True))
    assert (errors[counts == 4] > reached[counts == 4]).all()
    assert (errors[counts == TOKENS] < reached[counts == TOKENS]).all()
    assert set(counts.tolist()) == {4, TOKENS}
    module = stage(1, exchange=1.0)
    middle = torch.full((9,), 0.1)
    assert torch.equal(module.answers(torch.full((9,), 5), middle), middle)


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
    assert trained_weights(str(tmp_path / "model")).keys() == {f"model.{name}" for name in second.model.state_dict()}
    assert same(stage(1, base_from=str(tmp_path / "model")).model.base, second.model.base)
