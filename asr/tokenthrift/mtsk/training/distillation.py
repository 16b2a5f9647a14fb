"""Learning from a model that reads the same speech in more tokens: its predictions and its hidden states.

Source: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) and of hidden states (FitNets, arXiv 1412.6550).
Not in Llama-MTSK (arXiv 2503.06362), whose scales learn from the texts alone. A text says little about what a token of
sound should be, and a few hours of texts are soon learned by heart; a language model that has read every state of the
encoder shows in each layer what each word of the text must have found in the sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded

__all__ = ["DistillConfig", "Taught", "Teacher", "distance"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What to learn from.

    Args:
        teacher: model folder or Hub id of a Llama-MTSK of the same encoders, tokenizer and shape of language model. It
            reads at its finest rates.
        predictions: weight of the divergence from its predictions, beside the cross entropy of the texts.
        states: weight of the distance from its hidden states.
    """

    teacher: str
    predictions: float = 1.0
    states: float = 1.0


@dataclass(frozen=True, slots=True)
class Taught:
    """What a teacher makes of a batch of n text tokens and ends.

    Attributes:
        predictions: (n, V) logarithms of probabilities.
        states: (n, H) of each layer.
    """

    predictions: Tensor
    states: tuple[Tensor, ...]


class Teacher:
    """A frozen model that reads at its finest rates; no module, so that no checkpoint holds it.

    Args:
        config: which one, and the weights of the losses.
        model: the one to be taught.

    Raises:
        ValueError: their tokenizers or language models have different shapes.
    """

    def __init__(self, config: DistillConfig, model: LlamaMtsk) -> None:
        self.config, self.model = config, LlamaMtsk.from_pretrained(config.teacher).requires_grad_(False)
        own, other = self.model.config.language_model, model.config.language_model
        shapes = [(sizes.vocab_size, sizes.hidden_size, sizes.num_hidden_layers) for sizes in (own, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the teacher's language model has other sizes: {shapes[0]} instead of {shapes[1]}")
        if self.model.tokenizer.to_str() != model.tokenizer.to_str():
            raise ValueError(f"the teacher {config.teacher} has another tokenizer")

    @torch.no_grad()
    def taught(self, encoded: Encoded, ids: Sequence[Sequence[int]]) -> Taught:
        """Reads a batch of states (B) and texts."""
        streams = {name: getattr(encoded, name) for name in ("audio", "video")}
        self.model.to(next(states.device for states in streams.values() if states is not None))
        there = {name: states is not None for name, states in streams.items()}
        rates = next(rates for rates in self.model.config.scales if rates.fits(**there))
        states = self.model.text_states(self.model.rows(encoded, ids, rates), rates)
        return Taught(self.model.language_model.lm_head(states[-1]).float().log_softmax(-1), states)

    def loss(
        self, model: LlamaMtsk, encoded: Encoded, ids: Sequence[Sequence[int]], rates: Rates, taught: Taught
    ) -> Tensor:
        """Cross entropy of the texts, and the distances from what the teacher makes of them, by their weights."""
        rows = model.rows(encoded, ids, rates)
        states = model.text_states(rows, rates)
        predictions = model.language_model.lm_head(states[-1]).float().log_softmax(-1)
        parts = [F.nll_loss(predictions, rows.targets)]
        if self.config.predictions:
            divergence = F.kl_div(predictions, taught.predictions, log_target=True, reduction="batchmean")
            parts.append(self.config.predictions * divergence)
        if self.config.states:
            parts.append(self.config.states * distance(states, taught.states))
        return torch.stack(parts).sum()


def distance(states: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states (n, H), as a share of the variance of those taught; the mean over layers."""
    shares = []
    for own, other in zip(states, taught, strict=True):
        spread = (other - other.mean(0)).square().sum().clamp_min(1e-6)
        shares.append((own - other).float().square().sum() / spread)
    return torch.stack(shares).mean()
