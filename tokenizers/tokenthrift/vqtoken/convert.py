"""The published VQToken checkpoint to our folder: `tokenthrift convert vqtoken CHECKPOINT OUT`.

CHECKPOINT is the folder of a LLaVA trainer (`haichaozhang/VQ-Token-llava-ov-0.5b`): config.json and model.safetensors,
or shards of it, or pytorch_model.bin, which is read without running code. OUT becomes a VQToken with the published
attention (config.json, model.safetensors) and, in OUT/vlm, the language model as transformers' own LLaVA-OneVision with
the tokenizer files beside it. `tokenthrift.vqtoken.video_lm.chat.VideoChat` loads both; each also loads alone.

Names are mapped by rule and the result is compared with the classes themselves: a missing, left-over or mis-shaped
tensor is an error that names it. So is a checkpoint without the 20 tensors of VQ-attention, which the published loader
fills with random numbers in silence (LLaVA-OneVision itself, whose weights have every other name). A checkpoint
without vision tower is refused too: the encoder was fine-tuned.

The published weights are gated and were not at hand: names and shapes are those of the published code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenthrift.hub import CONFIG, WeightsError
from tokenthrift.untrusted import read_checkpoint, tensors_in
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.video_lm.chat import VLM

__all__ = ["ConvertedVQToken", "vqtoken"]

_ATTENTION: Final = "model.cross_attention."
# In the order tried; the rest of a name stays.
_NAMES: Final = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.image_newline$", "model.image_newline"),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
# The pooling head of SigLIP and position ids, which some releases stored; nothing reads them.
_UNREAD: Final = re.compile(r"\.vision_model\.(head\.|embeddings\.position_ids$)|\.rotary_emb\.inv_freq$")
_HEAD_WIDTH: Final = 72  # of SigLIP so400m, whose sizes are not in a LLaVA config.json
_PLACEHOLDERS: Final = (151_646, 151_647)  # unused numbers of Qwen2's vocabulary, as in llava-hf's conversion
_TOKENIZER: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "merges.txt",
)
_TEXT: Final = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps"),
)


class ConvertedVQToken(VQToken):
    """A VQToken that is saved together with its language model, which is no part of it."""

    beside: tuple[Any, tuple[Path, ...]]
    """The transformers model, and the files of its tokenizer."""

    def write_assets(self, folder: Path) -> None:
        """Writes the language model in the precision of its checkpoint, and the tokenizer's files."""
        language_model, tokenizer_files = self.beside
        language_model.save_pretrained(folder / VLM, max_shard_size="100GB")
        for path in tokenizer_files:
            shutil.copyfile(path, folder / VLM / path.name)


def vqtoken(checkpoints: Sequence[Path]) -> VQToken:
    """The model of a published checkpoint.

    Args:
        checkpoints: One folder, or the files of one with config.json beside them.

    Raises:
        WeightsError: The tensors are not those of VQToken on LLaVA-OneVision.
        OSError: There is no such file.
    """
    folder = checkpoints[0] if checkpoints[0].is_dir() else checkpoints[0].parent
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if settings.get("model_type") != "llava_qwen":
        raise WeightsError(
            f"{folder / CONFIG}: model_type is {settings.get('model_type')!r}; a published checkpoint has 'llava_qwen'"
        )
    tensors = _read(_weight_files(folder) if checkpoints[0].is_dir() else checkpoints)
    attention = {
        name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith(_ATTENTION)
    }
    model = _attention_model(attention, folder)
    files = tuple(path for name in _TOKENIZER if (path := folder / name).is_file())
    model.beside = (_language_model(tensors, settings, folder), files)
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder; safetensors before pickles, and what is named by an index where there is one."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        for index in folder.glob(f"{pattern.replace('*', '')}.index.json"):
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if absent := [name for name in named if not (folder / name).is_file()]:
                raise WeightsError(f"{index} names files that are not there: {', '.join(absent)}")
            found = [folder / name for name in named]
        if found:
            return found
    raise WeightsError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        stored = path.suffix == ".safetensors"
        part = load_file(path) if stored else tensors_in(read_checkpoint(path), path)
        if twice := sorted(set(part) & set(tensors)):
            raise WeightsError(f"{path} repeats tensors of another file: {', '.join(twice[:10])}")
        tensors |= part
    return tensors


def _attention_model(tensors: Mapping[str, Tensor], folder: Path) -> ConvertedVQToken:
    sizes = {"to_q_proj.weight": "queries", "transformer_decoder.layers.0.linear1.weight": "the feed-forward part"}
    query, inside = (tensors.get(f"cross_attention.{name}") for name in sizes)
    if query is None or inside is None or query.ndim != 2 or inside.ndim != 2:
        raise WeightsError(
            f"{folder} has no VQ-attention ({_ATTENTION}*, 20 tensors): a LLaVA-OneVision and no VQToken checkpoint"
        )
    hidden_size, num_patches = query.shape
    attention = AttentionConfig(hidden_size=hidden_size, intermediate_size=len(inside), num_patches=num_patches)
    config = VQTokenConfig(compat="released", attention=attention)
    with torch.device("meta"):
        model = ConvertedVQToken(config)
    _fill(model, tensors, folder, "VQ-attention")
    return model


def _language_model(tensors: dict[str, Tensor], settings: Mapping[str, Any], folder: Path) -> Any:
    from transformers import GenerationConfig, LlavaOnevisionForConditionalGeneration

    state, unknown = {}, []
    for name in list(tensors):
        tensor = tensors.pop(name)
        if _UNREAD.search(name):
            continue
        for pattern, replacement in _NAMES:
            if re.match(pattern, name):
                state[re.sub(f"^{pattern}", replacement, name)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(f"{folder}: tensors of no known part: {', '.join(sorted(unknown)[:10])}")
    config = _config(state, settings, folder)
    embeddings, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings:
        state[head] = state[embeddings]
    for name in (embeddings, head):
        if (missing := config.text_config.vocab_size - len(state[name])) > 0:
            state[name] = torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    _fill(model, state, folder, "LLaVA-OneVision")
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=settings.get("eos_token_id"))
    return model


def _fill(module: nn.Module, state: Mapping[str, Tensor], folder: Path, part: str) -> None:
    """Gives a module on the meta device its tensors, all of them and no others."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} is {list(tensor.shape)} and should be {list(expected[name])}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if problems:
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(f"{folder} does not fit {part}: {'; '.join(problems[:10])}{rest}")
    module.load_state_dict(dict(state), strict=True, assign=True)


def _config(state: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path) -> Any:
    """transformers' configuration; what a LLaVA config.json lacks is read off the tensors."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    tower = "model.vision_tower."
    try:
        patch = state[f"{tower}embeddings.patch_embedding.weight"]
        positions = state[f"{tower}embeddings.position_embedding.weight"]
        inside = state[f"{tower}encoder.layers.0.mlp.fc1.weight"]
        embeddings = state["model.language_model.embed_tokens.weight"]
        text = {name: settings[name] for name in _TEXT}
    except KeyError as error:
        raise WeightsError(f"{folder} does not fit LLaVA-OneVision: {error.args[0]} is missing") from None
    side = round(len(positions) ** 0.5)
    names = (re.match(re.escape(tower) + r"encoder\.layers\.(\d+)\.", name) for name in state)
    vision = SiglipVisionConfig(
        hidden_size=len(patch),
        intermediate_size=len(inside),
        num_hidden_layers=1 + max(int(name[1]) for name in names if name),
        num_attention_heads=max(len(patch) // _HEAD_WIDTH, 1),
        # so400m-patch14-384: 27 patches of 14 pixels, with 6 pixels to spare.
        image_size=384 if (side, patch.shape[3]) == (27, 14) else side * patch.shape[3],
        patch_size=patch.shape[3],
        vision_use_head=False,
    )
    vocabulary = len(embeddings)
    placeholders = _PLACEHOLDERS if vocabulary > max(_PLACEHOLDERS) else (vocabulary, vocabulary + 1)
    tied = bool(settings.get("tie_word_embeddings", False)) or "lm_head.weight" not in state
    special = {name: settings[name] for name in ("bos_token_id", "eos_token_id") if name in settings}
    rope = {"rope_type": "default", "rope_theta": float(settings.get("rope_theta", 1e6))}
    grid = settings.get("image_grid_pinpoints")
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(
            **text,
            **special,
            rope_parameters=rope,
            vocab_size=max(vocabulary, placeholders[1] + 1),
            tie_word_embeddings=tied,
        ),
        image_token_index=placeholders[0],
        video_token_index=placeholders[1],
        tie_word_embeddings=tied,
        **({"image_grid_pinpoints": grid} if isinstance(grid, list) else {}),
    )
