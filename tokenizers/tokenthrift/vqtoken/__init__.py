"""A whole video in a handful of tokens: codes of a clustering and a token hash (VQToken, arXiv 2503.16980).

config       `VQTokenConfig`: the settings of a model
model        `VQToken`, a model and a token reducer: `reduce`, `compress`, `plan`
clustering   cosine k-means, the same on every device; hierarchy: all smaller K by merging; adaptive: which K
codebook     means and medoids of clusters
token_hash   where clusters lie, their order, and what the index map says of every code
attention    VQ-attention, corrected and as published
streaming    `Stream`: clips of any length, chunk by chunk
released     the published rules of both eras; convert: published checkpoints to model folders
files        `tokenthrift plan` and `tokenize` on videos

video_lm     questions to LLaVA-OneVision (`VideoChat`) and the paper's training (`LlavaVQTokenModule`)
synthetic    `VideoAnswerer`, a small video language model, with its synthetic questions, data and training
harnesses    VQToken inside lmms-eval and VLMEvalKit
evaluation   `tokenthrift evaluate vqtoken`: accuracy and reconstruction beside baselines
"""

from typing import TYPE_CHECKING

from tokenthrift.lazy import attach

if TYPE_CHECKING:
    from tokenthrift.vqtoken.config import AttentionConfig as AttentionConfig
    from tokenthrift.vqtoken.config import VQTokenConfig as VQTokenConfig
    from tokenthrift.vqtoken.model import Compressed as Compressed
    from tokenthrift.vqtoken.model import VQToken as VQToken
    from tokenthrift.vqtoken.streaming import Stream as Stream
    from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer as VideoAnswerer
    from tokenthrift.vqtoken.synthetic.data import VQTokenDataModule as VQTokenDataModule
    from tokenthrift.vqtoken.synthetic.module import VQTokenModule as VQTokenModule
    from tokenthrift.vqtoken.video_lm.chat import VideoChat as VideoChat
    from tokenthrift.vqtoken.video_lm.data import VideoConversationsDataModule as VideoConversationsDataModule
    from tokenthrift.vqtoken.video_lm.module import LlavaVQTokenModule as LlavaVQTokenModule

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AttentionConfig": "config",
        "Compressed": "model",
        "LlavaVQTokenModule": "video_lm.module",
        "Stream": "streaming",
        "VQToken": "model",
        "VQTokenConfig": "config",
        "VQTokenDataModule": "synthetic.data",
        "VQTokenModule": "synthetic.module",
        "VideoAnswerer": "synthetic.answerer",
        "VideoChat": "video_lm.chat",
        "VideoConversationsDataModule": "video_lm.data",
    },
)
