"""A VideoAnswerer that fits in a test, and options of its training."""

from __future__ import annotations

from typing import Any

import torch

from tokenthrift.vqtoken import AttentionConfig, VideoAnswerer, VQTokenConfig
from tokenthrift.vqtoken.attention import VQAttention
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig

SIZES: dict[str, Any] = {
    "num_frames": 4,
    "image_size": 16,
    "patch_size": 4,
    "encoder_hidden_size": 16,
    "encoder_num_hidden_layers": 1,
    "token_dim": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DATA: dict[str, Any] = {"num_frames": 4, "image_size": 16, "patch_size": 4, "questions_per_clip": 4}


def tiny_answerer(seed: int = 0) -> VideoAnswerer:
    """Random weights; its VQ-attention does something, unlike a fresh one."""
    vqtoken = VQTokenConfig(attention=AttentionConfig(hidden_size=40, num_attention_heads=2, intermediate_size=24))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoAnswerer(AnswererConfig(vqtoken=vqtoken, encoder_num_attention_heads=2, **SIZES))
        assert isinstance(model.vqtoken.cross_attention, VQAttention)
        torch.nn.init.normal_(model.vqtoken.cross_attention.gate, 0.5)
    return model.eval()
