"""Fine-tuning of LLaVA-OneVision with VQToken, as the paper trains its model.

Source: VQToken (arXiv 2503.16980, section 4 and finetune_ov_all.sh): everything learns from the cross-entropy of the
answers, AdamW, cosine decay, warm-up over 3 % of the steps, no weight decay; the language model and the projector at
1e-5, the vision tower at 2e-6, VQ-attention at 1e-5 (the script: 1e-6).

What differs: transformers' LlavaOnevisionForConditionalGeneration with `attach` instead of a fork of LLaVA, so
clustering sees the 196 tokens a frame that transformers pools 729 to, where the published code does not pool; a fresh
VQ-attention is the corrected one, which changes nothing at first, instead of a layer that starts at random; clustering
draws nothing, so a clip has the same codes in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetLike, TokenBudget
from tokenthrift.config import from_plain, to_plain
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import balanced
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.video_lm.chat import VLM
from tokenthrift.vqtoken.video_lm.data import ConversationBatch

__all__ = ["LlavaVQTokenModule"]

_OPTIM: Final = OptimConfig(learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.999), warmup_steps=0.03)


class LlavaVQTokenModule(L.LightningModule):
    """Trains a LLaVA-OneVision that reads videos as codes, on batches of `VideoConversationsDataModule`.

    Args:
        base: transformers checkpoint of LLaVA-OneVision, folder or Hub id.
        vqtoken: model folder or Hub id of a VQToken to start from; a fresh one if not given.
        budget: tokens of a video, the newline after it included.
        optim: training of language model and projector, and of the other parts but for their learning rates.
        attention_learning_rate: of VQ-attention.
        vision_learning_rate: of the vision tower; 0 leaves it as it is.
        num_attention_heads: of a fresh VQ-attention.
        intermediate_size: width inside a fresh VQ-attention.
        gradient_checkpointing: computes activations of the language model and vision tower twice to save memory.
    """

    def __init__(
        self,
        base: str = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        vqtoken: str | None = None,
        budget: BudgetLike = "33",
        optim: OptimConfig = _OPTIM,
        attention_learning_rate: float = 1e-5,
        vision_learning_rate: float = 2e-6,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        gradient_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.budget = TokenBudget.parse(budget)
        # A checkpoint holds plain data, so that it is read without running code.
        self.optim = from_plain(OptimConfig, to_plain(optim))
        self.save_hyperparameters(ignore=["budget", "optim"])
        self.save_hyperparameters({"budget": self.budget.to_dict(), "optim": to_plain(self.optim)})
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True
        )
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._freeze(vision_learning_rate)
        if vqtoken is not None:
            self.vqtoken = VQToken.from_pretrained(vqtoken)
        else:
            attention = AttentionConfig(
                hidden_size=self.model.config.text_config.hidden_size,
                num_attention_heads=num_attention_heads,
                intermediate_size=intermediate_size,
            )
            self.vqtoken = VQToken(VQTokenConfig(attention=attention))
        self.train()

    def _freeze(self, vision_learning_rate: float) -> None:
        """Freezes what gets no gradient: DistributedDataParallel waits for every parameter that requires one."""
        tower = self.model.model.vision_tower
        tower.requires_grad_(vision_learning_rate > 0)
        layer = self.model.config.vision_feature_layer
        blocks = tower.encoder.layers
        # Hidden state n is what n blocks give; the norm and the pooling after them are no hidden state.
        last = max(n % (len(blocks) + 1) for n in ([layer] if isinstance(layer, int) else layer))
        for part in (*blocks[last:], tower.post_layernorm, getattr(tower, "head", None)):
            if part is not None:
                part.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        """AdamW with a rate for each part, warm-up and cosine decay."""
        h: Any = self.hparams
        tower = "model.model.vision_tower."
        named = list(self.named_parameters())
        parts = [
            (h.vision_learning_rate, [p for p in named if p[0].startswith(tower)]),
            (h.attention_learning_rate, [p for p in named if p[0].startswith("vqtoken.")]),
            (None, [p for p in named if not p[0].startswith((tower, "vqtoken."))]),
        ]
        groups = [group for rate, part in parts for group in parameter_groups(part, self.optim, learning_rate=rate)]
        return optimizer_and_schedule(groups, self.optim, int(self.trainer.estimated_stepping_batches))

    def loss(self, batch: Sequence[ConversationBatch]) -> Tensor:
        """Nats per token of the answers, with the video in as many tokens as the budget allows."""
        losses, tokens = [], 0
        for conversation in batch:
            with attach(self.model, self.vqtoken, self.budget, modalities=("video",)) as handle:
                losses.append(self.model(**conversation.inputs, labels=conversation.labels, use_cache=False).loss)
            tokens += sum(usage.used for usage in handle.usage)
        self.log("tokens", tokens / len(losses), batch_size=len(losses))
        return torch.stack(losses).mean()

    def training_step(self, batch: Sequence[ConversationBatch], index: int) -> Tensor:
        """The mean loss of the conversations of a batch."""
        loss = balanced(self.loss(batch), len(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    def validation_step(self, batch: Sequence[ConversationBatch], index: int) -> None:
        """The same, without learning."""
        self.log("val/loss", self.loss(batch), prog_bar=True, batch_size=len(batch), sync_dist=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `tokenthrift convert vqtoken` writes: VQToken to the folder, the language model, as transformers
        does, and its tokenizer to `vlm` below it."""
        vlm = Path(folder) / VLM
        self.vqtoken.save_pretrained(folder)
        self.model.save_pretrained(vlm)
        hparams: Any = self.hparams
        AutoTokenizer.from_pretrained(hparams.base).save_pretrained(vlm)
