"""Fine-tuning of LLaVA-OneVision with VQToken, as the paper trains its model.

Source: VQToken (arXiv 2503.16980, section 4 and finetune_ov_all.sh): everything learns from the cross-entropy of the
answers, AdamW, cosine decay, warm-up over 3 % of the steps, no weight decay; the language model and the projector at
1e-5, the vision tower at 2e-6, VQ-attention at 1e-5 (the script: 1e-6).

What differs: transformers' LlavaOnevisionForConditionalGeneration with `attach` instead of a fork of LLaVA, so
clustering sees the 196 tokens a frame that transformers pools 729 to, where the published code does not pool; a fresh
VQ-attention is the corrected one, which changes nothing at first, instead of a layer that starts at random; clustering
draws nothing, so that a clip has the same codes whenever it comes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tokenthrift.attachment import attach
from tokenthrift.budget import TokenBudget
from tokenthrift.training.schedule import warmup_cosine
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
from tokenthrift.vqtoken.video_lm.data import ConversationBatch
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.video_lm.chat import VLM

__all__ = ["LlavaVQTokenModule"]


class LlavaVQTokenModule(L.LightningModule):
    """Trains a LLaVA-OneVision that reads videos as codes.

    Args:
        base: transformers checkpoint of LLaVA-OneVision, folder or Hub id.
        vqtoken: model folder or Hub id of a VQToken to begin with; a fresh one if not given.
        budget: tokens of a video, the newline after it included.
        heads: of a fresh VQ-attention.
        ffn: width inside a fresh VQ-attention.
        learning_rate: of language model and projector.
        attention_learning_rate: of VQ-attention.
        vision_learning_rate: of the vision tower; 0 leaves it as it is.
        warmup: share of the steps with a rising rate.
        weight_decay: of matrices.
        gradient_checkpointing: computes activations of the language model and vision tower twice to save memory.
    """

    def __init__(
        self,
        base: str = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        vqtoken: str | None = None,
        budget: str = "33",
        heads: int = 8,
        ffn: int = 2048,
        learning_rate: float = 1e-5,
        attention_learning_rate: float = 1e-5,
        vision_learning_rate: float = 2e-6,
        warmup: float = 0.03,
        weight_decay: float = 0.0,
        gradient_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        from transformers import LlavaOnevisionForConditionalGeneration

        self.save_hyperparameters()
        self.budget = TokenBudget.parse(budget)
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True
        )
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self._freeze(vision_learning_rate)
        if vqtoken is not None:
            self.vqtoken = VQToken.from_pretrained(vqtoken)
        else:
            width = self.model.config.text_config.hidden_size
            attention = AttentionConfig(width=width, heads=heads, ffn=ffn)
            self.vqtoken = VQToken(VQTokenConfig(attention=attention))

    def _freeze(self, vision_learning_rate: float) -> None:
        """What gets no gradient asks for none, as DistributedDataParallel waits for all that do."""
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
        tower = {id(weight) for weight in self.model.model.vision_tower.parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in tower]
        parts = [
            (h.learning_rate, rest),
            (h.attention_learning_rate, [p for p in self.vqtoken.parameters() if p.requires_grad]),
            (h.vision_learning_rate, [p for p in self.model.model.vision_tower.parameters() if p.requires_grad]),
        ]
        groups = [
            {"params": chosen, "lr": rate, "weight_decay": decay}
            for rate, weights in parts
            for decay, chosen in (
                (h.weight_decay, [p for p in weights if p.ndim > 1]),
                (0.0, [p for p in weights if p.ndim < 2]),
            )
            if chosen
        ]
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, round(h.warmup * steps), floor=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss(self, batch: ConversationBatch) -> Tensor:
        """Nats per token of the answers, with the video in as many tokens as the budget allows."""
        with attach(self.model, self.vqtoken, self.budget, modalities=("video",)) as handle:
            loss: Tensor = self.model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        self.log("tokens", float(sum(usage.used for usage in handle.usage)), batch_size=1)
        return loss

    def training_step(self, batch: ConversationBatch, index: int) -> Tensor:
        """The loss of one conversation."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: ConversationBatch, index: int) -> None:
        """The same, without learning."""
        self.log("val/loss", self.loss(batch), prog_bar=True, batch_size=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `tokenthrift convert vqtoken` writes: VQToken to the folder, the language model, as transformers
        does, and its tokenizer to `vlm` below it."""
        from transformers import AutoTokenizer

        vlm = Path(folder) / VLM
        self.vqtoken.save_pretrained(folder)
        self.model.save_pretrained(vlm)
        hparams: Any = self.hparams
        AutoTokenizer.from_pretrained(hparams.base).save_pretrained(vlm)
