"""The protocol of masked-diffusion backbones: what a denoiser needs from a language model, and no more.

A masked-diffusion language model (LLaDA, arXiv 2502.09992; dLLM-ASR, arXiv 2601.17902) sees a response in which some
slots are MASK and says, for every slot at once, which token belongs there. The loop that decides which of those
predictions to keep lives elsewhere; here is only the forward pass, split in two so that what depends on the input
alone (a projected prefix, the keys and values of a cross-attention) is computed once and reused over all rounds.

Differs from the published loops: rows of a batch are padded, masked and independent (upstream LLaDA ignores its
attention mask and decodes one utterance at a time), and the shift of models whose row i predicts token i + 1 is undone
inside the backbone, so row i always speaks about slot i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Context", "MaskedDiffusionBackbone", "forbid", "hinted", "zero_padding"]


@dataclass(frozen=True, slots=True)
class Context:
    """What a backbone keeps of a batch of inputs between two rounds.

    Attributes:
        mask: (B, N) bool, True where a memory position exists.
        states: tensors whose first axis is B; what they are is the backbone's business.
    """

    mask: Tensor
    states: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor) -> Context:
        """Keeps the given rows, in the given order (a row may be asked for twice).

        Args:
            rows: (R,) int64 indices into the batch.
        """
        return Context(self.mask[rows], tuple(state[rows] for state in self.states))


class MaskedDiffusionBackbone(nn.Module, ABC):
    """A language model that predicts every response slot at once, given a memory of multimodal states.

    Contract, for every subclass: rows are right-padded and independent, so a row of a batch equals that row alone to
    1e-5 whatever its neighbors, the amount of padding and its content (NaN included); the logits of `mask_id` are
    -inf, because a slot that predicts MASK would never be decided; logits of padded slots are finite but mean nothing.

    Attributes:
        vocab_size: number of tokens, MASK included.
        memory_size: width of the memory that `context` reads.
        mask_id: the id of the MASK token.
    """

    vocab_size: int
    memory_size: int
    mask_id: int

    @abstractmethod
    def context(self, memory: Tensor, memory_mask: Tensor) -> Context:
        """Computes what depends on the memory alone, once per batch.

        Args:
            memory: (B, N, memory_size) float.
            memory_mask: (B, N) bool, True where a position exists; rows are right-padded.
        """

    @abstractmethod
    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        context: Context,
        windows: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """Predicts every slot of a response.

        Args:
            ids: (B, L) int64, undecided slots hold `mask_id`, padding any valid id.
            mask: (B, L) bool, True where a slot exists; rows are right-padded.
            context: of the same B rows.
            windows: (B, L, 2) float, the first and last memory position (fractions allowed, infinity for an open end)
                where what a slot says is expected: only backbones that attend to the memory can use it.
            hints: (B, L) int64, tokens that a draft had in undecided slots, `mask_id` where there is none; their
                embedding
                is added to that of MASK.

        Returns:
            (B, L, vocab_size) logits; row i speaks about the token at slot i.
        """


def hinted(embeddings: Tensor, hint_embeddings: Tensor, ids: Tensor, hints: Tensor, mask_id: int) -> Tensor:
    """Adds the embeddings of hints to undecided slots.

    Args:
        embeddings: (B, L, D) of `ids`.
        hint_embeddings: (B, L, D) of `hints`.
        ids: (B, L).
        hints: (B, L), `mask_id` where there is none.
        mask_id: id of MASK.
    """
    used = (ids == mask_id) & (hints != mask_id)
    return embeddings + hint_embeddings.masked_fill(~used.unsqueeze(-1), 0.0)


def zero_padding(states: Tensor, mask: Tensor) -> Tensor:
    """Replaces the states (B, N, D) where mask (B, N) is False by zeros; NaN times zero would still be NaN."""
    return states.masked_fill(~mask.unsqueeze(-1), 0.0)


def forbid(logits: Tensor, token: int) -> Tensor:
    """Sets the logits (..., vocab) of one token to -inf, leaving the input as it was."""
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[token] = True
    return logits.masked_fill(banned, float("-inf"))
