"""What every model of the package promises, as one class of tests that each system's test file inherits.

A subclass says how to build a tiny random model, what its items are, what it computes for them and what its training
loss is; the tests are the same for all: shapes, gradients, determinism, independence from neighbours, save and load,
half precision, resuming, and that a few items can be learnt.
"""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenthrift.hub import HubModel

Outputs = list[list[Tensor]]
"""For every item what the model computes for it, cut to what exists of the item."""


class ModelContract(ABC):
    """The laws of a model; named so that pytest runs only the subclasses (`class TestKarl(ModelContract)`)."""

    tolerance: ClassVar[float] = 1e-5
    """How far a row of a batch may be from the row alone."""
    learning_rate: ClassVar[float] = 3e-3
    steps: ClassVar[int] = 40
    """Steps in which the loss of a few items must fall to `learnt` of what it was."""
    learnt: ClassVar[float] = 0.5

    @abstractmethod
    def build(self) -> HubModel:
        """A tiny random model; the global generator is seeded before."""

    @abstractmethod
    def items(self) -> list[Any]:
        """At least three items of unequal size, the longest not first."""

    @abstractmethod
    def outputs(self, model: Any, items: list[Any]) -> Outputs:
        """What the model computes for a batch of items."""

    @abstractmethod
    def shapes(self, model: Any, item: Any) -> list[tuple[int, ...]]:
        """The shapes of `outputs` for one item."""

    @abstractmethod
    def loss(self, model: Any, items: list[Any]) -> Tensor:
        """The training loss of a batch of items; the same every time."""

    def model(self) -> HubModel:
        """The model of all tests, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def compute(self, model: HubModel, items: list[Any]) -> Outputs:
        with torch.no_grad():
            return self.outputs(model, items)

    def train(self, model: HubModel, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(model, self.items())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def optimizer(self, model: HubModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], self.learning_rate)

    def test_shapes(self) -> None:
        model, items = self.model(), self.items()
        outputs = self.compute(model, items)
        assert [[tuple(part.shape) for part in item] for item in outputs] == [self.shapes(model, i) for i in items]
        assert not any(part.isnan().any() for item in outputs for part in item)

    def test_gradient_reaches_every_trainable_parameter(self) -> None:
        model = self.model()
        self.loss(model, self.items()).backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert without == []
        assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []

    def test_same_input_same_bits_without_global_randomness(self) -> None:
        model, items = self.model(), self.items()
        state = torch.random.get_rng_state()
        first = self.compute(model, items)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(12345)
        second = self.compute(model, items)
        torch.random.set_rng_state(state)
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))

    def test_a_row_of_a_batch_equals_the_row_alone(self) -> None:
        model, items = self.model(), self.items()
        together = self.compute(model, items)
        for item, expected in zip(items, together, strict=True):
            (alone,) = self.compute(model, [item])
            torch.testing.assert_close(alone, expected, rtol=0, atol=self.tolerance)

    def test_saved_and_loaded_it_is_the_same(self, tmp_path: Path) -> None:
        model, items = self.model(), self.items()
        model.save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(tmp_path / "model")
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert loaded.config == model.config
        assert not loaded.training
        torch.testing.assert_close(self.compute(loaded, items), self.compute(model, items), rtol=0, atol=0)

    def test_half_precision_runs_and_means_about_the_same(self) -> None:
        model, items = self.model(), self.items()
        half = self.compute(copy.deepcopy(model).to(torch.bfloat16), items)
        for item, expected in zip(half, self.compute(model, items), strict=True):
            for part, whole in zip(item, expected, strict=True):
                finite = whole.isfinite()
                assert torch.equal(part.isfinite(), finite)
                error = (part.float() - whole)[finite].square().mean().sqrt()
                assert error < 0.1 * whole[finite].std() + 1e-2, f"off by {error}"

    def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(self) -> None:
        whole_model = self.model()
        whole = self.train(whole_model, self.optimizer(whole_model), 4)
        model = self.model()
        optimizer = self.optimizer(model)
        first = self.train(model, optimizer, 2)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = self.model()
        resumed.load_state_dict(saved["model"])
        resumed_optimizer = self.optimizer(resumed)
        resumed_optimizer.load_state_dict(saved["optimizer"])
        assert first + self.train(resumed, resumed_optimizer, 2) == whole

    def test_a_few_items_can_be_learnt(self) -> None:
        model = self.model()
        losses = self.train(model, self.optimizer(model), self.steps)
        assert losses[-1] < self.learnt * losses[0], f"from {losses[0]:.3f} to {losses[-1]:.3f} only"
