"""A VideoAnswerer that fits in a test, and options of its training."""

from __future__ import annotations

from typing import Any

import torch

from tokenthrift.vqtoken import AttentionConfig, VideoAnswerer, VQTokenConfig
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig
from tokenthrift.vqtoken.attention import VQAttention

SIZES: dict[str, Any] = {
    "frames": 4,
    "side": 16,
    "patch": 4,
    "encoder_width": 16,
    "encoder_layers": 1,
    "token_width": 40,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "ffn": 32,
}
DATA: dict[str, Any] = {"frames": 4, "side": 16, "patch": 4, "questions": 4}


def tiny_answerer(seed: int = 0) -> VideoAnswerer:
    """Random weights; its VQ-attention does something, unlike a fresh one."""
    vqtoken = VQTokenConfig(attention=AttentionConfig(width=40, heads=2, ffn=24))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoAnswerer(AnswererConfig(vqtoken=vqtoken, encoder_heads=2, **SIZES))
        assert isinstance(model.vqtoken.cross_attention, VQAttention)
        torch.nn.init.normal_(model.vqtoken.cross_attention.gate, 0.5)
    return model.eval()
