"""A whole video in a handful of tokens: codes of a clustering and a token hash (VQToken, arXiv 2503.16980).

model        `VQToken`, a model and a token reducer: `reduce`, `compress`, `plan`; config: its settings
clustering   cosine k-means, the same on every device; hierarchy: all smaller K by merging; adaptive: which K
places       where clusters lie, and their order; codebook: means and medoids
token_hash   what the index map says of every code; attention: VQ-attention, corrected and released
streaming    `Stream`: clips of any length, chunk by chunk
released     the published rules of both eras; convert: published checkpoints to model folders
vlm          `VideoChat`: questions to LLaVA-OneVision; lmms_eval, vlmevalkit: the same inside those harnesses
encoders     what makes native tokens; files: `tokenthrift plan` and `tokenize` on videos
questions    synthetic scenes and questions; scenes: their frames; data: `VQTokenDataModule`
finetune     `LlavaVQTokenModule` and, in finetune_data, `VideoConversationsDataModule`: the paper's training
answerer     `VideoAnswerer`, a small video language model; module: `VQTokenModule`, its training
evaluate     `tokenthrift evaluate vqtoken`; baselines: what VQToken is compared with; real_clips: on files, without
             questions; strips: pictures of their regions; flops: work and time
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer
    from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
    from tokenthrift.vqtoken.synthetic.data import VQTokenDataModule
    from tokenthrift.vqtoken.video_lm.module import LlavaVQTokenModule
    from tokenthrift.vqtoken.video_lm.data import VideoConversationsDataModule
    from tokenthrift.vqtoken.model import Compressed, VQToken
    from tokenthrift.vqtoken.synthetic.module import VQTokenModule
    from tokenthrift.vqtoken.streaming import Stream

_HOMES = {
    "AttentionConfig": "config",
    "Compressed": "model",
    "LlavaVQTokenModule": "finetune",
    "Stream": "streaming",
    "VQToken": "model",
    "VQTokenConfig": "config",
    "VQTokenDataModule": "data",
    "VQTokenModule": "module",
    "VideoAnswerer": "answerer",
    "VideoConversationsDataModule": "finetune_data",
}
__all__ = [
    "AttentionConfig",
    "Compressed",
    "LlavaVQTokenModule",
    "Stream",
    "VQToken",
    "VQTokenConfig",
    "VQTokenDataModule",
    "VQTokenModule",
    "VideoAnswerer",
    "VideoConversationsDataModule",
]


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for: reducing needs no Lightning."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.vqtoken.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
