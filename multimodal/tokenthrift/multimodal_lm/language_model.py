"""The frozen language model inside a `MultimodalLM`: built from plain data, adapted by peft, filled from its source.

Any causal model of transformers serves; its class comes from transformers' own table by the model type, never from a
folder (no remote code). LoRA is that of peft, put into the model's own modules. What differs from
`peft.get_peft_model`: the model is not wrapped, so it stays what transformers' `generate` and hooks know.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tokenthrift.external import assign_state, is_adapter
from tokenthrift.extras import require
from tokenthrift.multimodal_lm.config import LanguageModelConfig, LoraConfig
from tokenthrift.sources import WeightsError

__all__ = ["build", "exact_buffers", "fill"]


def build(sizes: LanguageModelConfig, lora: LoraConfig) -> PreTrainedModel:
    """The model, frozen but for its adapters, in evaluation mode; without its weights where they have a source."""
    config = AutoConfig.for_model(**sizes.config)
    auto: Any = AutoModelForCausalLM
    with nullcontext() if sizes.source is None else no_init_weights():
        lm = auto.from_config(config, dtype=torch.float32)
    lm.generation_config = GenerationConfig()  # nothing is sampled unless a caller asks for it
    lm.requires_grad_(False)
    if lora.rank:
        peft: Any = require("peft")
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=list(lora.targets))
        peft.inject_adapter_in_model(settings, lm)
    return cast(PreTrainedModel, lm.eval())


def fill(lm: PreTrainedModel, sizes: LanguageModelConfig, source: str | Path, **options: Any) -> None:
    """Puts the weights of a checkpoint into the model; its adapters stay.

    Args:
        lm: as `build` makes it; its parameters may have no memory.
        sizes: what it was built of; it may have fewer layers than the checkpoint, whose first ones it then is.
        source: folder or Hub id, in safetensors.
        options: of the Hub's client.

    Raises:
        WeightsError: tensors are missing or of another shape.
        OSError: the source leads nowhere.
    """
    auto: Any = AutoModelForCausalLM
    # With our own configuration, layers that it cuts off are not read.
    given, found = auto.from_pretrained(
        source,
        config=AutoConfig.for_model(**sizes.config),
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing, mismatched = sorted(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    if missing or mismatched:
        problems = [*(f"{name} is missing" for name in missing), *(f"{name} does not fit" for name in mismatched)]
        raise WeightsError(f"{source} is not the language model of the configuration: {'; '.join(problems[:5])}")
    assign_state(lm, given.state_dict(), str(source))
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def exact_buffers(lm: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """Rotary frequencies, which a cast to bf16 would put off by up to 0.2 %."""
    return {
        (module, name): value
        for module in lm.modules()
        for name, value in module.named_buffers(recurse=False)
        if "inv_freq" in name
    }
