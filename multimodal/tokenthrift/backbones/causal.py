"""Causal language models that read multimodal tokens as a prefix: any `AutoModelForCausalLM`.

Source: the prefix of LLaVA (arXiv 2304.08485) and its kind. The model classes are those of transformers, used as a
library; nothing of the model is replaced, so LoRA, quantisation and generation work as they do without a prefix.

Differs from the usual code: tokens may be padded on either side and rows may differ in length; each row is packed
without holes, tokens then text, so its positions are those of the row alone, and a row's output does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenthrift.backbones.masked import zero_padding
from tokenthrift.backbones.prefix import pack

__all__ = ["CausalBackbone"]


class CausalBackbone(nn.Module):
    """A language model whose input is [tokens, text], each position seeing those before it.

    Args:
        lm: from `AutoModelForCausalLM` or of its own making; `memory_size` is its embedding width.

    Attributes:
        vocab_size: number of text tokens.
        memory_size: width of the multimodal tokens that it reads.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.vocab_size, self.memory_size = cast(Tensor, lm.get_input_embeddings().weight).shape

    def forward(self, tokens: Tensor, token_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Predicts every token of a text from what is before it.

        Args:
            tokens: (B, N, memory_size), at least one of them real in each row; padding is not read.
            token_mask: (B, N) bool, True where a token is real.
            ids: (B, L) int64; padding any valid id.
            mask: (B, L) bool, True where a text token exists; rows are right-padded.

        Returns:
            (B, L, vocab_size) logits; row i speaks about the token at place i of the text. Padding means nothing.

        Raises:
            ValueError: a row has no token, or more positions than the model was built for.
        """
        embeddings, seen = self._join(tokens, token_mask, ids, mask)
        trunk = getattr(self.lm, self.lm.base_model_prefix)
        hidden: Tensor = trunk(inputs_embeds=embeddings, attention_mask=seen.long(), use_cache=False)[0]
        places = token_mask.sum(1, keepdim=True) - 1 + torch.arange(ids.shape[1], device=ids.device)
        places = places.clamp(max=hidden.shape[1] - 1)  # only padding points beyond its row
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return cast(Tensor, cast(Any, self.lm).get_output_embeddings()(hidden))

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, token_mask: Tensor, prompt: Sequence[int] = (), *, max_new_tokens: int, end: int
    ) -> list[list[int]]:
        """Writes a text for each row, always the likeliest token.

        Args:
            tokens: (B, N, memory_size).
            token_mask: (B, N) bool.
            prompt: ids between tokens and text, the same for every row.
            max_new_tokens: most tokens to write.
            end: id that ends a text, and is not part of it.

        Raises:
            ValueError: as `forward`.
        """
        ids = torch.tensor([list(prompt)] * len(tokens), dtype=torch.int64, device=tokens.device).view(len(tokens), -1)
        embeddings, seen = self._join(tokens, token_mask, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens)
        # Generation goes on at the right, so the padding moves to the left.
        order = seen.long().argsort(dim=1, stable=True)
        embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
        out: Tensor = cast(Any, self.lm).generate(
            inputs_embeds=embeddings,
            attention_mask=seen.gather(1, order).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts = []
        for row in out.tolist():
            texts.append(row[: row.index(end)] if end in row else row)
        return texts

    def _join(
        self, tokens: Tensor, token_mask: Tensor, ids: Tensor, mask: Tensor, room: int = 0
    ) -> tuple[Tensor, Tensor]:
        """[tokens, text] without holes, and where they are."""
        if not bool(token_mask.any(1).all()):
            raise ValueError("every row needs at least one token before its text")
        text: Tensor = self.lm.get_input_embeddings()(ids)
        states = torch.cat([zero_padding(tokens, token_mask).to(text.dtype), text], 1)
        states, seen = pack(states, torch.cat([token_mask, mask], 1))
        most = getattr(self.lm.config, "max_position_embeddings", None)
        if most is not None and states.shape[1] + room > most:
            raise ValueError(
                f"tokens and text take {states.shape[1] + room} positions, the model has {most}: "
                "lower the token budget or shorten the text"
            )
        return states, seen
