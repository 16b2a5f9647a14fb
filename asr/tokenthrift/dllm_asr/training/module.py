"""Training of dLLM-ASR under Lightning: the CTC draft and the denoiser, over a frozen encoder.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992) for the forward process and the 1/t loss; learning
rates, batch and schedule are not published. What differs: draft-like rows beside random masking (see `examples`), and
both heads may be trained apart, since they share nothing but the frozen encoder.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.draft import character_ids, ctc_loss
from tokenthrift.dllm_asr.model import STATE_RATE
from tokenthrift.dllm_asr.pretrained import assemble
from tokenthrift.dllm_asr.training.corruption import Corrupted, diffusion_loss, hide_spans
from tokenthrift.dllm_asr.training.data import Batch
from tokenthrift.dllm_asr.training.examples import responses
from tokenthrift.evaluation.wer import word_errors
from tokenthrift.training.schedule import warmup_cosine

__all__ = ["DllmAsrModule", "trained_weights"]


def trained_weights(source: str) -> dict[str, Tensor]:
    """The weights that a training checkpoint trained, or all of a model folder, by their names in a `DllmAsrModule`."""
    if Path(source).is_dir():
        tensors = load_file(Path(source) / "model.safetensors")
        return {f"model.{name}": tensor.float() for name, tensor in tensors.items()}
    data = torch.load(source, map_location="cpu", weights_only=True)
    options = data["hyper_parameters"]
    draft = ("model.draft.",) if options["train_draft"] else ()
    parts = (*draft, "model.adapter.", "model.backbone.") if options["train_denoiser"] else draft
    return {name: weight for name, weight in data["state_dict"].items() if name.startswith(parts)}


class DllmAsrModule(L.LightningModule):
    """Trains the draft head, the adapter and the language model.

    Args:
        whisper: transformers checkpoint of an English Whisper, folder or Hub id.
        language_model: transformers checkpoint to denoise with (BERT, ModernBERT, Llama family); Whisper's decoder if
            not given.
        vocabulary_size: tokens to keep of its vocabulary.
        positions: longest response of Whisper's decoder.
        pool: average pooling of the 50 encoder states a second.
        stride: stride of the adapter's convolution; 1 leaves it out.
        train_draft: train the CTC head.
        train_denoiser: train adapter and language model.
        learning_rate: of adapter and language model.
        draft_learning_rate: of the CTC head.
        warmup_steps: steps of linear warm-up, before a cosine decay over the rest of the run.
        weight_decay: of matrices.
        draft_share: share of training rows that look like drafts.
        decided_share: share of those that are shown as they look some rounds later.
        fully_masked: share of the other rows that are masked from end to end.
        substitution: share of visible tokens replaced by random ones.
        visible_weight: weight of the cross-entropy of visible tokens.
        hidden_states: share of the encoder states that training hides, in spans of up to 0.3 s.
        start_from: training checkpoints, or model folders, to begin with; each gives the parts that it trained, later
            ones win. The schedule starts anew. A denoiser that starts from a trained draft is validated with it.
    """

    def __init__(
        self,
        whisper: str = "openai/whisper-tiny.en",
        language_model: str | None = None,
        vocabulary_size: int = 5000,
        positions: int = 256,
        pool: int = 2,
        stride: int = 1,
        train_draft: bool = True,
        train_denoiser: bool = True,
        learning_rate: float = 3e-4,
        draft_learning_rate: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.01,
        draft_share: float = 0.5,
        decided_share: float = 0.5,
        fully_masked: float = 0.2,
        substitution: float = 0.03,
        visible_weight: float = 0.1,
        hidden_states: float = 0.0,
        start_from: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = assemble(
            whisper,
            language_model,
            vocabulary_size=vocabulary_size,
            positions=positions,
            adapter=AdapterConfig(pool=pool, stride=stride),
        )
        self.has_draft = train_draft
        for path in start_from or []:
            weights = trained_weights(path)
            self.has_draft |= any(name.startswith("model.draft.") for name in weights)
            if self.load_state_dict(weights, strict=False).unexpected_keys:
                raise ValueError(f"{path} is of another model")
        self.model.draft.requires_grad_(train_draft)
        for part in (self.model.adapter, self.model.backbone):
            part.requires_grad_(train_denoiser)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay."""
        h: Any = self.hparams
        groups = []
        denoiser = [self.model.adapter, self.model.backbone]
        for rate, parts in ((h.draft_learning_rate, [self.model.draft]), (h.learning_rate, denoiser)):
            named = [item for part in parts for item in part.named_parameters() if item[1].requires_grad]
            # Matrices decay; the bias of the fading causal mask is a table of (layers, heads), not a matrix.
            decays = [p.ndim > 1 and not name.endswith("future") for name, p in named]
            for matrices in (True, False):
                chosen = [p for (_, p), d in zip(named, decays, strict=True) if d == matrices]
                groups.append({"params": chosen, "lr": rate, "weight_decay": h.weight_decay if matrices else 0.0})
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, h.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The sum of the CTC loss and the diffusion loss, of those that are trained."""
        h: Any = self.hparams
        loss = torch.zeros((), device=self.device)
        if h.hidden_states:
            states = hide_spans(batch.states, batch.lengths, h.hidden_states, seed=batch.seed)
            batch = replace(batch, states=states)
        if h.train_draft:
            targets = [character_ids(t) for t in batch.texts]
            ctc = ctc_loss(self.model.draft(batch.states, batch.lengths), batch.lengths, targets)
            self.log("train/ctc", ctc, prog_bar=True)
            loss = loss + ctc
        if h.train_denoiser:
            diffusion = self.denoising_loss(batch)
            self.log("train/diffusion", diffusion, prog_bar=True)
            loss = loss + diffusion
        return loss

    def denoising_loss(self, batch: Batch) -> Tensor:
        """Nats per token of a batch under the forward process; its randomness comes from the batch alone."""
        rng = random.Random(batch.seed)
        seconds = (batch.lengths / STATE_RATE).tolist()
        h: Any = self.hparams
        made = responses(
            batch.texts,
            seconds,
            batch.drafts,
            self.model.vocabulary,
            rng,
            draft_share=h.draft_share,
            decided_share=h.decided_share,
            fully_masked=h.fully_masked,
            substitution=h.substitution,
            positions=self.model.room(int(batch.lengths.max())),
        )
        targets, mask, hints = (t.to(self.device) for t in (made.targets, made.mask, made.hints))
        seen = Corrupted(*(t.to(self.device) for t in (made.seen.ids, made.seen.masked, made.seen.rates)))
        windows = made.windows.to(self.device) * (STATE_RATE / self.model.adapter.rate)
        context = self.model.backbone.context(*self.model.adapter(batch.states, batch.lengths))
        logits = self.model.backbone(seen.ids, mask, context, windows, hints)
        return diffusion_loss(logits, targets, mask, seen, visible_weight=h.visible_weight)

    def on_validation_epoch_start(self) -> None:
        """Forgets the texts of the last validation."""
        self.heard: dict[int, list[tuple[str, str, str, int]]] = {}

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        """Drafts and transcripts of one batch, by the parts that are trained; an untrained draft is not used."""
        h: Any = self.hparams
        rows = self.heard.setdefault(dataloader_idx, [])
        drafts = [" ".join(w.text for w in words) for words in self.model.drafts(batch.states, batch.lengths)]
        settings = replace(self.model.config.decode, draft="confident" if self.has_draft else "none")
        budget = DecodeBudget(max_rounds=32)
        done = self.model.decode(batch.states, batch.lengths, budget, settings) if h.train_denoiser else []
        for i, text in enumerate(batch.texts):
            rows.append((text, drafts[i], done[i].text if done else drafts[i], done[i].usage.rounds if done else 0))

    def on_validation_epoch_end(self) -> None:
        """Word error rates of draft and transcript, and mean rounds, for each development set and over all."""
        for i, rows in self.heard.items():
            truth, draft, text, rounds = zip(*rows, strict=True)
            self.log(f"val/draft_wer_{i}", word_errors(truth, draft).rate, prog_bar=True)
            self.log(f"val/wer_{i}", word_errors(truth, text).rate, prog_bar=True)
            self.log(f"val/rounds_{i}", sum(rounds) / len(rounds))
        rows = [row for part in self.heard.values() for row in part]
        self.log("val/wer", word_errors([r[0] for r in rows], [r[2] for r in rows]).rate)
        self.log("val/draft_wer", word_errors([r[0] for r in rows], [r[1] for r in rows]).rate)
