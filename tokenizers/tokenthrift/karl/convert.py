"""Checkpoints to a model folder: `tokenthrift convert karl FILE OUT`.

Source: the authors' five files, `karl_small_{vqgan,vae}_{quantized,continuous}_latents.pth`: a dictionary whose "ema"
is the model, beside optimizer, discriminators and the pickled `argparse.Namespace` of the training. Which of them a
file is, is read off its tensors; the model computes as published (`compat="released"`).

What differs: the published loader unpickles everything and ignores missing and unknown tensors. Here nothing but
tensors is read, and every tensor must be there in its shape. Checkpoints of our own training have their configuration
inside and convert the same way; where the weights were averaged, the average is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tokenthrift.config import from_plain
from tokenthrift.hub import HubModel
from tokenthrift.karl.config import NAMED_SIZES, KarlConfig, named, upgraded
from tokenthrift.karl.model import Karl
from tokenthrift.sources import WeightsError
from tokenthrift.untrusted import read_checkpoint, tensors_in
from tokenthrift.weights import NAMES_SHOWN

__all__ = ["karl", "our_name", "released_config", "released_model"]

NOT_THE_MODEL: Final = ("gan_losses.",)
INERT: Final = ("argparse.Namespace", "pathlib.PosixPath")
RENAMED: Final = (
    (r"^base_tokenizer\.(vqgan|vae)\.quantize\.embedding\.weight$", "base.codebook"),
    (r"^base_tokenizer\.(vqgan|vae)\.", "base."),
    (r"^quantize\.embedding\.weight$", "quantiser.codebook"),
    (r"^(encoder|decoder)_positional_embedding$", r"\1.positions"),
    (r"^decoder_mask_token$", "decoder.cell"),
    (r"^decoder_latent_tokens_timestep_embed$", "decoder.places"),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^latent_tokens$", "encoder.queries"),
    (r"^rec_loss_embeddings$", "encoder.error.table"),
    (r"^patch_embed\.", "encoder.patches."),
    (r"^encoder_ln_pre\.", "encoder.transformer.norm_in."),
    (r"^encoder_ln_post_halt\.", "halting.norm."),
    (r"^halting_mlp\.", "halting.mlp."),
    (r"^encoder_ln_post\.", "norm_tokens."),
    (r"^pre_quantizer_mlp\.", "to_tokens."),
    (r"^decoder\.ln_pre\.", "decoder.transformer.norm_in."),
    (r"^decoder\.ln_post\.", "decoder.norm_out."),
    (r"^decoder\.ffn\.", "decoder.head."),
    (r"^(encoder|decoder)\.transformer\.(\d+)\.", r"\1.transformer.blocks.\2."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.c_fc\.", ".mlp.0."),
    (r"\.mlp\.c_proj\.", ".mlp.2."),
)


def our_name(name: str) -> str:
    """Our name of a published tensor."""
    base = name.startswith("base_tokenizer.")
    for pattern, replacement in RENAMED[:2] if base else RENAMED[2:]:
        name = re.sub(pattern, replacement, name)
    return name


def released_config(tensors: Mapping[str, Tensor]) -> KarlConfig:
    """The configuration that published tensors are of.

    Raises:
        WeightsError: they are of no named size.
    """

    def half(name: str) -> tuple[int, int]:
        layers = [key for key in tensors if re.fullmatch(rf"{name}\.transformer\.\d+\.ln_1\.weight", key)]
        return tensors[f"{name}.transformer.0.ln_1.weight"].numel(), len(layers)

    try:
        encoder, decoder = half("encoder"), half("decoder")
    except KeyError as error:
        raise WeightsError(f"not a KARL checkpoint: it has no {error}") from None
    for size, halves in NAMED_SIZES.items():
        if [(part.hidden_size, part.num_hidden_layers) for part in halves] == [encoder, decoder]:
            base = "vae" if any(name.startswith("base_tokenizer.vae.") for name in tensors) else "vqgan"
            return named(size, base, quantized="quantize.embedding.weight" in tensors, compat="released")
    raise WeightsError(
        f"a KARL checkpoint with widths and layers {encoder} and {decoder}; known are {', '.join(NAMED_SIZES)}"
    )


def released_model(tensors: Mapping[str, Tensor], config: KarlConfig | None = None) -> Karl:
    """A model with published tensors, in evaluation mode.

    Args:
        tensors: by their published names.
        config: the configuration they are of; found by `released_config` if not given.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_THE_MODEL)}
    found = {our_name(name): tensor for name, tensor in tensors.items()}
    if "quantiser.codebook" in found:
        found["quantiser.usage"] = torch.ones(len(found["quantiser.codebook"]))
    return _model_of(config or released_config(tensors), found)


def _model_of(config: KarlConfig, found: Mapping[str, Tensor]) -> Karl:
    with torch.device("meta"):
        model = Karl(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
        raise WeightsError(f"not the tensors of this KARL: {'; '.join(problems[:NAMES_SHOWN])}{more}")
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
    model.base.requires_grad_(False)
    return model


def karl(checkpoints: Sequence[Path]) -> HubModel:
    """The model of one checkpoint, published or of `KarlStage1Module` or `KarlStage2Module`.

    Raises:
        ConfigError: the configuration in our checkpoint is not valid.
        WeightsError: the file is another kind of checkpoint, or asks for code.
    """
    if len(checkpoints) != 1:
        raise WeightsError(f"a KARL checkpoint is one file, got {len(checkpoints)}")
    (path,) = checkpoints
    data = read_checkpoint(path, INERT)
    if not isinstance(data, dict):
        raise WeightsError(f"{path} is no KARL checkpoint but a {type(data).__name__}")
    options = data.get("hyper_parameters")
    if isinstance(options, dict) and ("config" in options or "model" in options):
        trained = tensors_in(data.get("state_dict"), path).items()
        found = {name.removeprefix("model."): tensor for name, tensor in trained if name.startswith("model.")}
        # A run that began before format_version 2 calls it `model`, and its fields as version 1 does.
        fields = options["config"] if "config" in options else upgraded(options["model"])
        return _model_of(from_plain(KarlConfig, fields, f"{path}: config"), found)
    return released_model(tensors_in(data.get("ema", data.get("model")), path))
