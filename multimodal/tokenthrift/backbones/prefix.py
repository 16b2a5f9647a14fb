"""Masked-diffusion backbones that read the memory as a prefix of the text: BERT, ModernBERT, or a Llama without causal
mask.

Source: dLLM-ASR (arXiv 2601.17902), sequence layout; LLaDA (arXiv 2502.09992), a Llama block whose attention sees both
ways. The model classes are those of transformers, used as a library.

Differs from the published code: rows of a batch may differ in length. Each is packed without holes, memory, prompt,
response, padding, so positions and ModernBERT's sliding windows are those of the row alone, and attention never
reaches padding (upstream LLaDA ignores its attention mask). Only response slots reach the vocabulary projection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone, forbid, hinted, zero_padding

__all__ = ["PrefixBackbone", "language_model", "pack", "trim_vocabulary"]

BIDIRECTIONAL = ("bert", "modernbert")
DECODERS = ("llama", "qwen2", "qwen3")
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


class PrefixBackbone(MaskedDiffusionBackbone):
    """A language model whose input is [memory, prompt, response], all of it visible from everywhere.

    Args:
        lm: a masked or causal language model, see `language_model`; `memory_size` is its embedding width.
        mask_id: id of MASK in its vocabulary.
        prompt: token ids between memory and response, the same for every row.
        shifted: True where the model was pretrained to predict the token after each position (Dream, or any
            autoregressive start); the logits of a slot are then read one position earlier.

    Raises:
        ValueError: a model family that is not supported, an attention other than SDPA, or an id outside of the
            vocabulary.
    """

    prompt: Tensor

    def __init__(self, lm: PreTrainedModel, mask_id: int, *, prompt: Sequence[int] = (), shifted: bool = False) -> None:
        super().__init__()
        _check_family(lm.config.model_type)
        if lm.config._attn_implementation != "sdpa":
            raise ValueError(f'the model must use attn_implementation="sdpa", not {lm.config._attn_implementation!r}')
        self.vocab_size, self.memory_size = cast(Tensor, lm.get_input_embeddings().weight).shape
        if not all(0 <= token < self.vocab_size for token in (mask_id, *prompt)):
            raise ValueError(f"mask_id {mask_id} and prompt {list(prompt)} must lie within 0..{self.vocab_size - 1}")
        self.lm = lm
        self.mask_id = mask_id
        self.shifted = shifted
        self.register_buffer("prompt", torch.tensor(list(prompt), dtype=torch.int64), persistent=False)

    def context(self, memory: Tensor, memory_mask: Tensor) -> Context:
        """Packs memory and prompt; see `MaskedDiffusionBackbone.context`."""
        prompt = self._embed(self.prompt).expand(len(memory), -1, -1)
        states = torch.cat([zero_padding(memory, memory_mask).to(prompt.dtype), prompt], 1)
        states, mask = pack(states, torch.cat([memory_mask, memory_mask.new_ones(prompt.shape[:2])], 1))
        return Context(mask, (states,))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        context: Context,
        windows: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """Predicts every slot of a response; see `MaskedDiffusionBackbone.forward`. Windows are not used.

        Raises:
            ValueError: a row has more positions than the model was built for.
        """
        (prefix,) = context.states
        response = self._embed(ids)
        if hints is not None:
            response = hinted(response, self._embed(hints), ids, hints, self.mask_id)
        embeddings, seen = pack(torch.cat([prefix, response], 1), torch.cat([context.mask, mask], 1))
        width, most = embeddings.shape[1], self.lm.config.max_position_embeddings
        if width > most:
            raise ValueError(
                f"memory, prompt and response take {width} positions, the model has {most}: "
                "shorten the input or the response"
            )
        hidden = self._hidden(embeddings, seen)
        slots = context.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        # Padded slots may point beyond the row; they mean nothing, so any position serves.
        slots = (slots - int(self.shifted)).clamp(0, width - 1)
        hidden = hidden.gather(1, slots.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return forbid(_head(self.lm, hidden), self.mask_id)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.lm.get_input_embeddings()(ids)
        return embedded

    def _hidden(self, embeddings: Tensor, seen: Tensor) -> Tensor:
        """Last hidden states (B, T, D); positions outside of `seen` (B, T) are invisible to every other."""
        if self.lm.config.model_type in DECODERS:
            # Four dimensions are taken as they are, so no causal mask is added. They are given also where nothing is
            # padded: without any mask the attention layers of a decoder fall back to causal.
            seen = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
        trunk = getattr(self.lm, self.lm.base_model_prefix)
        hidden: Tensor = trunk(inputs_embeds=embeddings, attention_mask=seen, use_cache=False)[0]
        return hidden


def language_model(source: str | Path | Mapping[str, Any]) -> PreTrainedModel:
    """Makes a language model that `PrefixBackbone` takes, in float32 with SDPA attention.

    Args:
        source: a local folder or Hub id, whose pretrained weights are loaded; or a configuration as plain data with
            its "model_type", for random weights.

    Returns:
        The model in evaluation mode where pretrained, in training mode where fresh. It has no `pad_token_id`:
        transformers would freeze that row of the embedding, which is often the one that ends a response.

    Raises:
        ValueError: a model family that is not supported.
    """
    if isinstance(source, Mapping):
        _check_family(str(source.get("model_type")))
        config = AutoConfig.for_model(**{**source, **dict.fromkeys(_SPECIAL_IDS)})
    else:
        config = AutoConfig.from_pretrained(source)
        config.pad_token_id = None
    _check_family(config.model_type)
    auto: Any = AutoModelForMaskedLM if config.model_type in BIDIRECTIONAL else AutoModelForCausalLM
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    fresh = isinstance(source, Mapping)
    if fresh:
        return cast(PreTrainedModel, auto.from_config(config, **settings))
    lm = auto.from_pretrained(source, config=config, use_safetensors=True, **settings)
    return cast(PreTrainedModel, lm)


def pack(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the existing positions of each row to its front, in their order, and cuts what no row needs.

    Args:
        states: (B, T, D).
        mask: (B, T) bool.

    Returns:
        States (B, T', D) and mask (B, T') with T' the longest row; what padding holds is unspecified.
    """
    width = int(mask.sum(1).max())
    order = (~mask).int().argsort(dim=1, stable=True)[:, :width]
    return states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1])), mask.gather(1, order)


def trim_vocabulary(lm: PreTrainedModel, keep: Sequence[int], extra: int = 0) -> PreTrainedModel:
    """Copies a language model with a smaller vocabulary: row i of the new one is row `keep[i]` of the old.

    Args:
        lm: the model, left as it is.
        keep: ids to keep, in their new order.
        extra: rows to append after them (for MASK, EOS and their like), each the mean of the kept rows.

    Returns:
        A model of the same class, dtype and mode, with `len(keep) + extra` tokens. Input embedding, output projection
        and output bias are cut alike, and stay tied where they were. The special ids of its configuration are unset.
    """
    config: PretrainedConfig = copy.deepcopy(lm.config)
    config.vocab_size = len(keep) + extra
    config.update(dict.fromkeys(_SPECIAL_IDS))
    family: Any = type(lm)
    trimmed = cast(PreTrainedModel, family(config).train(lm.training).to(lm.device, lm.dtype))
    state, shapes = lm.state_dict(), {name: tensor.shape for name, tensor in trimmed.state_dict().items()}
    rows = torch.tensor(list(keep), dtype=torch.int64, device=lm.device)
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            kept = tensor[rows]
            state[name] = torch.cat([kept, kept.mean(0, keepdim=True).expand(extra, *kept.shape[1:])])
    trimmed.load_state_dict(state)
    return trimmed


def _head(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The vocabulary projection, with whatever the family puts before it."""
    model: Any = lm
    if lm.config.model_type == "bert":
        logits: Tensor = model.cls(hidden)
    elif lm.config.model_type == "modernbert":
        logits = model.decoder(model.head(hidden))
    else:
        logits = model.lm_head(hidden)
    return logits


def _check_family(model_type: str) -> None:
    if model_type not in (*BIDIRECTIONAL, *DECODERS):
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join((*BIDIRECTIONAL, *DECODERS))}")
