"""A checkpoint with the names of the published VQToken, tiny and random, and the models it was made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokenthrift.vqtoken.attention import ReleasedVQAttention

WIDTH, PATCHES, WORDS = 32, 9, 97


def language_model(seed: int = 0) -> Any:
    """A LLaVA-OneVision of 9 patches a frame whose sizes can be told from its tensors, as those of SigLIP can."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=72,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=12,
        patch_size=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=1,
        bos_token_id=None,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=WORDS - 2, video_token_index=WORDS - 1
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def settings() -> dict[str, Any]:
    """The fields of config.json that matter, as the published trainer writes them."""
    return {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "image_grid_pinpoints": [[12, 12], [12, 24]],
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }


def tensors(model: Any, attention: ReleasedVQAttention) -> dict[str, Tensor]:
    """All weights under their published names."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = re.sub(r"multi_modal_projector\.linear_([12])", lambda m: f"mm_projector.{2 * int(m[1]) - 2}", name)
        renamed[name.replace("model.language_model.", "model.")] = tensor.clone()
    return renamed | {f"model.cross_attention.{name}": tensor for name, tensor in attention.state_dict().items()}


def attention(seed: int = 1) -> ReleasedVQAttention:
    torch.manual_seed(seed)
    return ReleasedVQAttention(WIDTH, 8, 64, PATCHES).eval()


def write(folder: Path, state: dict[str, Tensor], *, shards: int = 1, pickled: bool = False) -> Path:
    """A folder as a LLaVA trainer leaves it, with a tokenizer of words w0 ... w94."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings()))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    files = [
        f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}" for i in range(shards)
    ]
    for file, part in zip(files, parts, strict=True):
        data = {name: state[name].contiguous() for name in part}
        torch.save(data, folder / file) if pickled else save_file(data, folder / file)
    if shards > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"never read")
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(WORDS - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
