"""The parts that tiny configs of transformers' families are put together from: language models, towers, encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tests.multimodal.tiny_media import MELS, Inputs
from tests.multimodal.tiny_vlms import END, IMAGE, PAD, SIZE, START, VIDEO, VOCABULARY


def text(model_type: str = "", **more: Any) -> Any:
    values: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }
    return hf.AutoConfig.for_model(model_type, **values) if model_type else values


def tower(model_type: str, **more: Any) -> Any:
    values: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 4,
        **more,
    }
    return hf.AutoConfig.for_model(model_type, **values)


def qwen_tower(**more: Any) -> Inputs:
    return {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 24, **more}


ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
MROPE: Any = {**text(rope_parameters=ROPE)}
PLACEHOLDERS: Any = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MARKS: Any = {"vision_start_token_id": START, "vision_end_token_id": END}
GRID = [[SIZE * h, SIZE * w] for h in (1, 2) for w in (1, 2)]


def audio_tower(model_type: str, **more: Any) -> Any:
    values: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": MELS // 2, **more}
    return hf.AutoConfig.for_model(model_type, **values)


WHISPER: Any = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DEEPSEEK: Any = {
    "q_lora_rank": None,
    "head_dim": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def llava(cls: Any, vision: str = "clip_vision_model", language: str = "llama", **more: Any) -> Callable[[], Any]:
    """A model of a tower, a projector and a language model."""

    def config() -> Any:
        tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
        if cls not in (hf.LlavaNextVideoConfig, hf.VideoLlavaConfig, hf.LlavaOnevisionConfig):
            del tokens["video_token_index"]
        return cls(vision_config=tower(vision), text_config=text(language), **tokens, **more)

    return config
