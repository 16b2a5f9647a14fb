"""Training of dLLM-ASR under Lightning: the CTC draft and the denoiser, over a frozen encoder.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992) for the forward process and the 1/t loss; learning
rates, batch and schedule are not published. What differs: rows that start from drafts beside random masking (see
`examples`); both heads may be trained apart, since they share nothing but the frozen encoder; and an adapter of several
rates reads each recording of a batch at one of them (Matryoshka training, Kusupati et al., 2022).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.config import to_plain
from tokenthrift.dllm_asr.draft import character_ids, ctc_loss
from tokenthrift.dllm_asr.model import STATE_RATE, DllmAsr
from tokenthrift.dllm_asr.pretrained import assemble, assemble_around, encoder_of
from tokenthrift.dllm_asr.rates import Rate, adapted_length
from tokenthrift.dllm_asr.training.batch import AudioBatch, Batch
from tokenthrift.dllm_asr.training.config import TrainingConfig
from tokenthrift.dllm_asr.training.corruption import diffusion_loss, time_mask
from tokenthrift.dllm_asr.training.examples import build_batch
from tokenthrift.dllm_asr.training.weights import DRAFT, trained_weights
from tokenthrift.evaluation.wer import word_errors
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import balanced, gathered
from tokenthrift.training.start_weights import load_start_weights
from tokenthrift.training.text_log import log_texts

__all__ = ["DllmAsrModule"]

VALIDATION_ROUNDS = 32


class ValidationRow(NamedTuple):
    """One recording of a development set: the words spoken, those of the draft, those written, and rounds."""

    reference: str
    draft: str
    text: str
    rounds: int


def sample_lines(rows: Mapping[int, Sequence[ValidationRow]], most: int = 8) -> list[str]:
    """Some of what was said, drafted and written, by the number of the development set."""
    shown = ((number, row) for number, own in sorted(rows.items()) for row in own[:most])
    return [f"{number}: '{row.reference}' drafted '{row.draft}', written '{row.text}'" for number, row in shown]


def assembled(config: TrainingConfig) -> DllmAsr:
    """The model that a training begins with, around the pretrained parts that its configuration names."""
    if config.backbone is not None:
        return assemble_around(
            encoder_of(config.whisper, config.encoder),
            config.backbone,
            adapter=config.adapter,
            draft=config.draft,
            copy_encoder=config.copy_encoder,
            copy_language_model=config.copy_language_model,
        )
    return assemble(
        config.whisper,
        config.language_model,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        adapter=config.adapter,
        draft=config.draft,
    )


class DllmAsrModule(L.LightningModule):
    """Trains the draft head, the adapter and the language model.

    It takes a `Batch` of cached states, or an `AudioBatch` that it encodes. A denoiser that starts from a trained draft
    is validated with it.

    Args:
        config: the model to train, and how.
        optim: learning rate of adapter and language model, and the schedule of all parts.
    """

    def __init__(
        self,
        config: TrainingConfig = TrainingConfig(),  # noqa: B008  # frozen; a factory would hide the fields in --help
        optim: OptimConfig = OptimConfig(learning_rate=3e-4, warmup_steps=200, min_lr=1e-6),  # noqa: B008
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"config": to_plain(config), "optim": to_plain(optim)})
        self.config, self.optim = config, optim
        self.model = assembled(config)
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.has_draft = config.train_draft
        for source in config.start_from:
            try:
                filled = load_start_weights(self, trained_weights(source))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            self.has_draft |= any(name.startswith(DRAFT) for name in filled)
        self.model.train().encoder.eval()
        self.model.draft.requires_grad_(config.train_draft)
        for name, parameter in self.model.named_parameters():
            if name.startswith(("adapter.", "backbone.")):
                # A published language model is frozen but for its adapters.
                parameter.requires_grad_(config.train_denoiser and name in trainable)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay; the CTC head has a learning rate of its own."""
        groups = parameter_groups(self.model.draft, self.optim, learning_rate=self.config.draft_learning_rate)
        # The bias of the fading causal mask is a table of (layers, heads), not a matrix.
        for part in (self.model.adapter, self.model.backbone):
            groups += parameter_groups(part, self.optim, no_decay=("*future",))
        return optimizer_and_schedule(groups, self.optim, int(self.trainer.estimated_stepping_batches))

    def encoded(self, batch: Batch | AudioBatch) -> Batch:
        """The batch with encoder states."""
        if isinstance(batch, Batch):
            return batch
        states, lengths = self.model.encode(batch.audio)
        rows = len(batch.texts)
        return Batch(states, lengths, batch.texts, [()] * rows, [0] * rows)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The sum of the CTC loss and the diffusion loss, of those that are trained."""
        config = self.config
        loss = torch.zeros((), device=self.device)
        if config.time_mask_prob:
            states = time_mask(batch.states, batch.lengths, config.time_mask_prob, batch.seeds)
            batch = replace(batch, states=states)
        if config.train_draft:
            targets = [character_ids(t) for t in batch.texts]
            ctc = ctc_loss(self.model.draft(batch.states, batch.lengths), batch.lengths, targets)
            self.log("train/ctc", ctc, prog_bar=True)
            loss = loss + balanced(ctc, len(batch.texts))
        if config.train_denoiser:
            diffusion, weight = self.denoising_loss(batch)
            self.log("train/diffusion", diffusion, prog_bar=True)
            loss = loss + balanced(diffusion, weight)
        return loss

    def rates(self, batch: Batch) -> list[Rate]:
        """At which rate each recording is read: one that its own seed draws from those of the adapter."""
        adapter, out = self.model.config.adapter, []
        for states, seed in zip(batch.lengths.tolist(), batch.seeds, strict=True):
            pool = random.Random(f"rate {seed}").choice(adapter.trained_pools)
            out.append(Rate(pool, adapted_length(states, adapter, pool)))
        return out

    def memory(self, batch: Batch, rates: Sequence[Rate]) -> tuple[Tensor, Tensor]:
        """What the language model reads of a batch, and its mask."""
        several = len(self.model.config.adapter.trained_pools) > 1
        found: tuple[Tensor, Tensor] = self.model.adapter(batch.states, batch.lengths, rates if several else None)
        return found

    def denoising_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Nats per token of a batch under the forward process, and the rows that this is the mean of."""
        rates = self.rates(batch)
        made = build_batch(
            batch.texts,
            (batch.lengths / STATE_RATE).tolist(),
            batch.drafts,
            batch.seeds,
            self.model.vocabulary,
            self.config.examples,
            max_slots=min(map(self.model.max_slots, batch.lengths.tolist(), rates)),
        ).to(self.device)
        pools = torch.tensor([rate.pool for rate in rates], device=self.device)
        windows = made.windows * (STATE_RATE / (pools * self.model.config.adapter.stride))[:, None, None]
        context = self.model.backbone.context(*self.memory(batch, rates))
        logits = self.model.backbone(made.corrupted.ids, made.mask, context, windows, made.hints)
        loss = diffusion_loss(
            logits, made.targets, made.mask, made.corrupted, visible_weight=self.config.visible_weight
        )
        return loss, len(batch.texts)

    def on_validation_epoch_start(self) -> None:
        """Starts new lists of results, one for each development set."""
        self.validation_rows: dict[int, list[ValidationRow]] = {}

    def validation_step(self, batch: Batch | AudioBatch, index: int, dataloader_idx: int = 0) -> None:
        """Drafts and transcripts of one batch, by the parts that are trained; an untrained draft is not used."""
        self.validation_rows.setdefault(dataloader_idx, []).extend(self.validated(self.encoded(batch)))

    def validated(self, batch: Batch) -> list[ValidationRow]:
        """The results of one batch."""
        drafts = [" ".join(w.text for w in words) for words in self.model.drafts(batch.states, batch.lengths)]
        if not self.config.train_denoiser:
            return [ValidationRow(text, draft, draft, 0) for text, draft in zip(batch.texts, drafts, strict=True)]
        settings = replace(self.model.config.decode, draft="confident" if self.has_draft else "none")
        limits = DecodeBudget(max_rounds=VALIDATION_ROUNDS)
        done = self.model.decode(batch.states, batch.lengths, limits, settings)
        results = zip(batch.texts, drafts, done, strict=True)
        return [ValidationRow(text, draft, found.text, found.usage.rounds) for text, draft, found in results]

    def on_validation_epoch_end(self) -> None:
        """Word error rates of draft and transcript, and mean rounds, for each development set and over all; texts."""
        everything: list[ValidationRow] = []
        for i, own in sorted(self.validation_rows.items()):
            rows = gathered(own)
            everything += rows
            self._log_error_rates(rows, f"_{i}")
            self.log(f"val/rounds_{i}", sum(row.rounds for row in rows) / len(rows), sync_dist=True)
        self._log_error_rates(everything, "")
        log_texts(self, "val/texts", sample_lines(self.validation_rows))

    def _log_error_rates(self, rows: list[ValidationRow], suffix: str) -> None:
        truth = [row.reference for row in rows]
        draft, text = (word_errors(truth, [getattr(row, name) for row in rows]).rate for name in ("draft", "text"))
        self.log(f"val/draft_wer{suffix}", draft, prog_bar=bool(suffix), sync_dist=True)
        self.log(f"val/wer{suffix}", text, prog_bar=bool(suffix), sync_dist=True)
