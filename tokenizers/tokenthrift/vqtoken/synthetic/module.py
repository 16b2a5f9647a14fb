"""Training of the small answerer under Lightning: its encoder on patches, then its language model on questions.

Source: VQToken (arXiv 2503.16980, section 4): language-model cross-entropy only, AdamW, cosine decay. What differs: the
weights start at random, so the encoder first learns which shape each patch shows (stage "encoder"). Then VQ-attention
and language model learn to answer (stage "answers"). Each step of that stage has one kind and number of tokens, so one
set of weights reads all native tokens, the codes of VQToken and the tokens of every baseline. The recipe gives the
shares of the kinds, which belong beside every comparison.

The kind and number of tokens of a step follow from its number, and what is drawn for a clip from that clip and its
epoch. Losses are means over the batches of all processes. So two processes train as one with batches twice as large.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokenthrift.config import from_plain, to_plain
from tokenthrift.padding import pack
from tokenthrift.reducers import RandomSubset
from tokenthrift.tokens import TokenBatch
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import balanced, gathered
from tokenthrift.training.sampler import item_rng
from tokenthrift.training.start_weights import load_start_weights, read_start_weights
from tokenthrift.training.text_log import log_texts
from tokenthrift.vqtoken.attention import VQAttention
from tokenthrift.vqtoken.evaluation.baselines import BASELINES, baseline
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig, VideoAnswerer
from tokenthrift.vqtoken.synthetic.data import ClipBatch
from tokenthrift.vqtoken.synthetic.questions import COLORS, SHAPES

__all__ = ["VQTokenModule"]

_CONFIG: Final = AnswererConfig()
_OPTIM: Final = OptimConfig(learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.98), warmup_steps=100, min_lr=1e-6)
_VALIDATED: Final = 32  # tokens of a clip in validation
_SHOWN_CLIPS, _SHOWN_QUESTIONS = 2, 4  # of the logged answers


class VQTokenModule(L.LightningModule):
    """Trains a `VideoAnswerer` on batches of `VQTokenDataModule`.

    Args:
        config: the model.
        optim: how it is trained.
        stage: "encoder" learns what each patch shows, "answers" learns to answer with the encoder as it is.
        start_from: checkpoint of a training, or folder of a model, whose weights training starts from.
        mix: shares of the kinds of tokens among the steps of "answers": "full", "vqtoken" and the baselines.
        token_counts: numbers of tokens that reduced clips get, each as often.
        encoder_learning_rate: of the encoder in "answers"; 0 leaves it as it is.
        naming_weight: weight of `naming_loss` beside the answers.
        seed: of the kind and number of tokens of each step.
    """

    def __init__(
        self,
        config: AnswererConfig = _CONFIG,
        optim: OptimConfig = _OPTIM,
        stage: Literal["encoder", "answers"] = "answers",
        start_from: str | None = None,
        mix: dict[str, float] | None = None,
        token_counts: list[int] | None = None,
        encoder_learning_rate: float = 0.0,
        naming_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint holds plain data, so that it is read without running code.
        config, self.optim = from_plain(AnswererConfig, to_plain(config)), from_plain(OptimConfig, to_plain(optim))
        self.save_hyperparameters(ignore=["config", "optim"])
        self.save_hyperparameters({"config": to_plain(config), "optim": to_plain(self.optim)})
        self.mix = mix or {"full": 0.25, "vqtoken": 0.5, **dict.fromkeys(BASELINES, 0.05)}
        if unknown := set(self.mix) - {"full", "vqtoken", *BASELINES}:
            raise ValueError(f"mix: no kind of tokens is called {', '.join(sorted(unknown))}")
        self.token_counts = token_counts or [8, 16, 32, 64]
        self.model = VideoAnswerer(config)
        attention = self.model.vqtoken.cross_attention
        if isinstance(attention, VQAttention):
            # A closed gate protects a trained language model; here none is trained, and a closed gate opens slowly.
            nn.init.ones_(attention.gate)
        contents = self.model.project.out_features
        self.heads = nn.ModuleList(nn.Linear(contents, 1 + len(names)) for names in (COLORS, SHAPES))
        if start_from is not None:
            self._start(start_from)
        for part in (self.model.encoder, self.model.project):
            part.requires_grad_(stage == "encoder" or encoder_learning_rate > 0)
        self.heads.requires_grad_(stage == "encoder")
        for part in (self.model.vqtoken, self.model.read, self.model.lm):
            part.requires_grad_(stage == "answers")
        self.train()
        self.scores: dict[str, list[Tensor]] = defaultdict(list)

    def _start(self, source: str) -> None:
        found = read_start_weights(source)
        of_encoder = found.options.get("stage") == "encoder"
        trained = ("model.encoder.", "model.project.", "heads.")
        load_start_weights(self, found, keep=lambda name: not of_encoder or name.startswith(trained))

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay."""
        h: Any = self.hparams
        in_encoder = ("model.encoder.", "model.project.")
        named = list(self.named_parameters())
        rate = h.encoder_learning_rate if h.stage == "answers" else None
        groups = parameter_groups([p for p in named if p[0].startswith(in_encoder)], self.optim, learning_rate=rate)
        groups += parameter_groups([p for p in named if not p[0].startswith(in_encoder)], self.optim)
        return optimizer_and_schedule(groups, self.optim, int(self.trainer.estimated_stepping_batches))

    def training_step(self, batch: ClipBatch, index: int) -> Tensor:
        """Cross-entropy of patches, or of answers read from one kind and number of tokens."""
        tokens = self.encode(batch)
        if self.hparams["stage"] == "encoder":
            patches = self.patch_loss(tokens, batch)
            self.log("train/patches", patches, prog_bar=True, sync_dist=True)
            return patches
        kind, count = self.draw(self._step(index))
        reduced, maps = self.reduced(tokens, kind, count, batch.seeds)
        clips = self.model.prefill(reduced)
        naming = self.naming_loss(*pack(clips.states, clips.mask), self.shown(reduced, maps, batch), batch.shape_words)
        scores = self.model.score(clips, batch.question_ids)
        answering = cross_entropy(scores.flatten(0, 1).float(), batch.answer_ids.flatten())
        answering = balanced(answering, batch.answer_ids.numel())
        loss: Tensor = answering + self.hparams["naming_weight"] * naming
        # DistributedDataParallel needs every parameter in the loss, and VQ-attention is in that of its own codes only.
        loss = loss + sum(weight.sum() for weight in self.model.vqtoken.parameters()) * 0.0
        right = (scores.argmax(-1) == batch.answer_ids).float().mean()
        self.log("train/loss", answering, prog_bar=True, sync_dist=True)
        self.log("train/naming", naming, sync_dist=True)
        self.log(f"train/{kind}", right, prog_bar=kind in ("full", "vqtoken"))
        return loss

    def _step(self, index: int) -> int:
        """The number of the batch in the run, the same in all processes and after a resume."""
        return index if self._trainer is None else self._trainer.fit_loop.epoch_loop.total_batch_idx

    def draw(self, step: int) -> tuple[str, int]:
        """Kind and number of tokens of a step."""
        rng = item_rng(self.hparams["seed"], 0, step)
        return rng.choices(list(self.mix), list(self.mix.values()))[0], rng.choice(self.token_counts)

    def encode(self, batch: ClipBatch) -> TokenBatch:
        """Native tokens, without a graph where the encoder does not learn."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.model.project.weight.requires_grad):
            tokens = self.model.encode(batch.frames)
        # Mixed precision gives bf16, in which many tokens of one shape would be equal.
        return replace(tokens, embeddings=tokens.embeddings.float())

    def _contents(self, tokens: TokenBatch) -> Tensor:
        width = self.model.project.out_features
        return tokens.embeddings[..., :width] * math.sqrt(width)

    def reduced(
        self, tokens: TokenBatch, kind: str, count: int, seeds: list[int] | None = None
    ) -> tuple[TokenBatch, Tensor | None]:
        """Native tokens as a kind of `mix` keeps them, and the index maps (B, N) of codes."""
        if kind == "full":
            return tokens, None
        if kind == "random" and seeds is not None:
            each = (RandomSubset(seed).reduce(tokens.select([i]), count) for i, seed in enumerate(seeds))
            return TokenBatch.cat(list(each)), None
        if kind != "vqtoken":
            return baseline(kind, self.model.config.grid).reduce(tokens, count), None
        done = self.model.vqtoken.compress(tokens, count)
        return done.tokens, torch.stack(done.maps).flatten(1)

    def shown(self, tokens: TokenBatch, maps: Tensor | None, batch: ClipBatch) -> Tensor:
        """(B, N) which shape each token shows, 0 for none: that of most cells of a code, else of the token's cell."""
        shapes = batch.patch_labels[..., 2].flatten(1)
        if maps is None:
            return shapes.gather(1, tokens.positions.clamp(min=0))
        slots, kinds = tokens.mask.shape[1], batch.shape_words.shape[1]
        votes = shapes.new_zeros(len(shapes), slots * kinds)
        votes = votes.scatter_add(1, maps * kinds + shapes, torch.ones_like(shapes))
        winners: Tensor = votes.unflatten(1, (slots, -1)).argmax(2)
        return winners

    def naming_loss(self, states: Tensor, mask: Tensor, shown: Tensor, words: Tensor) -> Tensor:
        """Nats per word of what every token shows, predicted by the language model at the token.

        A token of a shape should predict its color, name, direction, order and corner, each as likely; a token of
        no shape the padding word, at a tenth of the weight. From the answers alone, a small model takes very long to
        find out which token shows which shape.

        Args:
            states: (B, N, hidden_size) after the last layer, one for each token.
            mask: (B, N) bool.
            shown: (B, N) shapes, 0 for none.
            words: (B, shapes, words) as in `ClipBatch.shape_words`.
        """
        nats = -self.model.lm.lm_head(states).float().log_softmax(-1)
        targets = words.gather(1, shown[..., None].expand(-1, -1, words.shape[2]))
        nats = nats.gather(2, targets).mean(2)
        return _mean(nats, mask & (shown > 0)) + 0.1 * _mean(nats, mask & (shown == 0))

    def patch_loss(self, tokens: TokenBatch, batch: ClipBatch) -> Tensor:
        """Nats of color and of name per patch; patches that show a shape weigh as much as those that show none."""
        contents, labels = self._contents(tokens), batch.patch_labels.flatten(1, 3)
        seen = labels[..., 0] > 0
        total = contents.new_zeros(())
        for head, target in zip(self.heads, labels[..., :2].unbind(-1), strict=True):
            nats = cross_entropy(head(contents).transpose(1, 2).float(), target, reduction="none")
            total = total + (_mean(nats, seen) + _mean(nats, ~seen)) / 2
        return total

    def validation_step(self, batch: ClipBatch, index: int) -> None:
        """Which answers are right, by kind of tokens; or which patches."""
        tokens = self.encode(batch)
        if self.hparams["stage"] == "encoder":
            contents, labels = self._contents(tokens), batch.patch_labels.flatten(1, 3)
            seen = labels[..., 0] > 0
            for name, head, target in zip(("color", "name"), self.heads, labels[..., :2].unbind(-1), strict=True):
                right = (head(contents).argmax(-1) == target).float()
                self.scores[f"{name} of shapes"].append(right[seen])
                self.scores[f"{name} of background"].append(right[~seen])
            return
        given = {}
        for kind in self.mix:
            scores = self.model(self.reduced(tokens, kind, _VALIDATED)[0], batch.question_ids)
            given[kind] = scores.argmax(-1)
            right = (given[kind] == batch.answer_ids).float()
            self.scores[kind].append(right.flatten())
            for i, questions in enumerate(batch.questions):
                for j, question in enumerate(questions):
                    if kind in ("full", "vqtoken"):
                        self.scores[f"{kind}: {question.kind}"].append(right[i, j][None])
        if index == 0:
            log_texts(self, "val/answers", _samples(batch, given, self.model.config.vocabulary))

    def on_validation_epoch_end(self) -> None:
        """Shares of right answers over the clips of all processes; baselines and VQToken at 32 tokens."""
        self._log_scores("val")

    def test_step(self, batch: ClipBatch, index: int) -> None:
        """Answers about test clips, as `validation_step`."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Shares of right answers about the test clips."""
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        own = {name: (float(torch.cat(rows).sum()), sum(map(len, rows))) for name, rows in self.scores.items()}
        totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for share in gathered([own]):
            for name, (right, count) in share.items():
                totals[name] = (totals[name][0] + right, totals[name][1] + count)
        for name, (right, count) in sorted(totals.items()):
            # Every process has the figure of all clips, so their mean is that figure.
            self.log(f"{part}/{name.replace(' ', '_')}", right / max(count, 1), sync_dist=True)
        self.scores.clear()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where `mask` is, over the batches of all processes; 0 where it is nowhere."""
    count = mask.sum()
    return balanced((values * mask).sum() / count.clamp(min=1), count)


def _samples(batch: ClipBatch, given: Mapping[str, Tensor], vocabulary: Sequence[str]) -> list[str]:
    """Questions about the first clips, the right answer, and what was answered from each kind of tokens."""
    lines = []
    for i, questions in enumerate(batch.questions[:_SHOWN_CLIPS]):
        for j, question in enumerate(questions[:_SHOWN_QUESTIONS]):
            answers = ", ".join(f"{kind}: {vocabulary[int(ids[i, j])]}" for kind, ids in given.items())
            lines.append(f"clip {i}: {question.text} {question.answer} | {answers}")
    return lines
