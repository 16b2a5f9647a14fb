"""Training of the small answerer under Lightning: its encoder on patches, then its language model on questions.

Source: VQToken (arXiv 2503.16980, section 4): language-model cross-entropy only, AdamW, cosine decay. What differs:
everything starts from random weights, so the encoder first learns which thing each patch shows ("encoder"); then
VQ-attention and language model learn to answer ("answers"), each batch with another kind and number of tokens, so that
one set of weights has read all native tokens, the codes of VQToken and the tokens of every baseline. Shares of the kinds
are in the recipe and belong beside every comparison.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokenthrift.budget import TokenBudget
from tokenthrift.tokens import TokenBatch
from tokenthrift.training.schedule import warmup_cosine
from tokenthrift.vqtoken.synthetic.answerer import AnswererConfig, VideoAnswerer
from tokenthrift.vqtoken.attention import VQAttention
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
from tokenthrift.vqtoken.synthetic.data import ClipBatch
from tokenthrift.vqtoken.synthetic.questions import COLORS, SHAPES
from tokenthrift.vqtoken.evaluation.baselines import BASELINES, baseline

__all__ = ["VQTokenModule"]


class VQTokenModule(L.LightningModule):
    """Trains a `VideoAnswerer`.

    Args:
        stage: "encoder" learns what each patch shows, "answers" learns to answer with the encoder as it is.
        start_from: checkpoint of a training, or folder of a model, to begin with.
        mix: shares of the kinds of tokens among the batches of "answers": "full", "vqtoken" and the baselines.
        counts: numbers of tokens that reduced clips are given, each as often.
        learning_rate: at its highest.
        encoder_learning_rate: of the encoder in "answers"; 0 leaves it as it is.
        naming: weight of `naming_loss` beside the answers.
        warmup_steps: steps of linear warm-up, before a cosine decay over the rest of the run.
        weight_decay: of matrices.
        frames: of a clip.
        side: pixels of a side of a frame.
        patch: pixels of a side of a patch.
        encoder_width: of the ViT.
        encoder_layers: of the ViT.
        token_width: of native tokens.
        position_weight: length of the code of the place in a token.
        width: of the language model.
        layers: of the language model.
        heads: of the language model.
        ffn: of the language model.
    """

    def __init__(
        self,
        stage: Literal["encoder", "answers"] = "answers",
        start_from: str | None = None,
        mix: dict[str, float] | None = None,
        counts: list[int] | None = None,
        learning_rate: float = 1e-3,
        encoder_learning_rate: float = 0.0,
        naming: float = 1.0,
        warmup_steps: int = 100,
        weight_decay: float = 0.01,
        frames: int = 8,
        side: int = 64,
        patch: int = 8,
        encoder_width: int = 128,
        encoder_layers: int = 4,
        token_width: int = 192,
        position_weight: float = 0.3,
        width: int = 192,
        layers: int = 3,
        heads: int = 3,
        ffn: int = 512,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = AnswererConfig(
            frames=frames,
            side=side,
            patch=patch,
            encoder_width=encoder_width,
            encoder_layers=encoder_layers,
            token_width=token_width,
            position_weight=position_weight,
            width=width,
            layers=layers,
            heads=heads,
            ffn=ffn,
            vqtoken=VQTokenConfig(
                attention=AttentionConfig(width=token_width, heads=4, ffn=2 * token_width, patches=(side // patch) ** 2)
            ),
        )
        self.mix = mix or {"full": 0.25, "vqtoken": 0.5, **dict.fromkeys(BASELINES, 0.05)}
        if unknown := set(self.mix) - {"full", "vqtoken", *BASELINES}:
            raise ValueError(f"mix: no kind of tokens is called {', '.join(sorted(unknown))}")
        self.counts = counts or [8, 16, 32, 64]
        self.model = VideoAnswerer(config)
        attention = self.model.vqtoken.cross_attention
        assert isinstance(attention, VQAttention)
        # Closed, so that it disturbs no trained language model; here none is trained, and a closed gate opens slowly.
        nn.init.ones_(attention.gate)
        contents = self.model.project.out_features
        self.heads = nn.ModuleList(nn.Linear(contents, 1 + len(names)) for names in (COLORS, SHAPES))
        if start_from is not None:
            self._start(Path(start_from))
        for part in (self.model.encoder, self.model.project):
            part.requires_grad_(stage == "encoder" or encoder_learning_rate > 0)
        self.heads.requires_grad_(stage == "encoder")
        for part in (self.model.vqtoken, self.model.read, self.model.lm):
            part.requires_grad_(stage == "answers")
        self.scores: dict[str, list[Tensor]] = defaultdict(list)

    def _start(self, source: Path) -> None:
        if source.is_dir():
            self.model.load_state_dict(VideoAnswerer.from_pretrained(source).state_dict())
            return
        saved = torch.load(source, map_location="cpu", weights_only=True)
        weights = saved["state_dict"]
        if saved["hyper_parameters"]["stage"] == "encoder":
            trained = ("model.encoder.", "model.project.", "heads.")
            weights = {name: weight for name, weight in weights.items() if name.startswith(trained)}
        try:
            unexpected = self.load_state_dict(weights, strict=False).unexpected_keys
        except RuntimeError as error:
            raise ValueError(f"{source} is of a model of other sizes: {error}") from None
        if unexpected:
            raise ValueError(f"{source} is of another model: it has {', '.join(unexpected[:3])}")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay."""
        h: Any = self.hparams
        encoder = {id(weight) for weight in self.model.trainable("encoder", "project")}
        groups = []
        for of_encoder in (True, False):
            own = [p for p in self.parameters() if p.requires_grad and (id(p) in encoder) == of_encoder]
            rate = h.encoder_learning_rate if of_encoder and h.stage == "answers" else h.learning_rate
            groups.append({"params": [p for p in own if p.ndim > 1], "lr": rate, "weight_decay": h.weight_decay})
            groups.append({"params": [p for p in own if p.ndim < 2], "lr": rate, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, h.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: ClipBatch, index: int) -> Tensor:
        """Cross-entropy of patches, or of answers read from one kind and number of tokens."""
        tokens = self.encode(batch)
        if self.hparams["stage"] == "encoder":
            patches = self.patch_loss(tokens, batch)
            self.log("train/patches", patches, prog_bar=True)
            return patches
        rng = random.Random(batch.seed)
        kind = rng.choices(list(self.mix), list(self.mix.values()))[0]
        count, seed = rng.choice(self.counts), rng.getrandbits(31)
        reduced = self.reduced(tokens, kind, count, seed)
        clips = self.model.prefill(reduced)
        naming = self.naming_loss(clips.states, self.shown(reduced, kind, batch), batch.names)
        scores = self.model.ask(clips, batch.questions)
        answering = cross_entropy(scores.flatten(0, 1).float(), batch.answers.flatten())
        loss: Tensor = answering + self.hparams["naming"] * naming
        right = (scores.argmax(-1) == batch.answers).float().mean()
        self.log("train/loss", answering, prog_bar=True)
        self.log("train/naming", naming)
        self.log(f"train/{kind}", right, prog_bar=kind in ("full", "vqtoken"))
        return loss

    def encode(self, batch: ClipBatch) -> TokenBatch:
        """Native tokens, without a graph where the encoder does not learn."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.model.project.weight.requires_grad):
            tokens = self.model.encode(batch.frames)
        # Mixed precision leaves bf16, in which tokens of one thing would no longer be told from each other's copies.
        return replace(tokens, embeddings=tokens.embeddings.float())

    def _contents(self, tokens: TokenBatch) -> Tensor:
        width = self.model.project.out_features
        return tokens.embeddings[..., :width] * math.sqrt(width)

    def reduced(self, tokens: TokenBatch, kind: str, count: int, seed: int = 0) -> TokenBatch:
        """Native tokens as a kind of `mix` keeps them."""
        if kind == "full":
            return tokens
        budget = TokenBudget(max_tokens=count)
        if kind != "vqtoken":
            return baseline(kind, self.model.config.grid, seed).reduce(tokens, budget)
        done = self.model.vqtoken.compress(tokens, budget)
        self.maps = torch.stack(done.maps).flatten(1)
        return done.tokens

    def shown(self, tokens: TokenBatch, kind: str, batch: ClipBatch) -> Tensor:
        """(B, N) which thing each token shows, 0 for none: most of its cells for a code, else its place."""
        things = batch.labels[..., 2].flatten(1)
        if kind != "vqtoken":
            return things.gather(1, tokens.positions.clamp(min=0))
        slots = tokens.mask.shape[1]
        votes = things.new_zeros(len(things), slots * batch.names.shape[1])
        votes = votes.scatter_add(1, self.maps * batch.names.shape[1] + things, torch.ones_like(things))
        winners: Tensor = votes.unflatten(1, (slots, -1)).argmax(2)
        return winners

    def naming_loss(self, states: Tensor, shown: Tensor, names: Tensor) -> Tensor:
        """Nats per word of what every token shows, said by the language model in the token's place.

        A token of a thing should name its color, shape, way, turn and end, each as likely; a token of nothing the
        padding word, at a tenth of the weight. Answers alone would have to find out by themselves which token is of
        what, which takes a small model very long.

        Args:
            states: (B, N, width) as in `Prefilled`.
            shown: (B, N) things, 0 for none.
            names: (B, things, words) as in `ClipBatch`.
        """
        nats = -self.model.lm.lm_head(states).float().log_softmax(-1)
        words = names.gather(1, shown[..., None].expand(-1, -1, names.shape[2]))
        said = nats.gather(2, words).mean(2)
        thing = shown > 0
        things, rest = ((said * which).sum() / which.sum().clamp(min=1) for which in (thing, ~thing))
        loss: Tensor = things + 0.1 * rest
        return loss

    def patch_loss(self, tokens: TokenBatch, batch: ClipBatch) -> Tensor:
        """Nats of color and of shape per patch; patches that show a thing weigh as much as those that show none."""
        contents, labels = self._contents(tokens), batch.labels.flatten(1, 3)
        seen = labels[..., 0] > 0
        weights = torch.where(seen, (~seen).sum() / seen.sum().clamp(min=1), 1.0)
        total = contents.new_zeros(())
        for head, target in zip(self.heads, labels[..., :2].unbind(-1), strict=True):
            nats = cross_entropy(head(contents).transpose(1, 2).float(), target, reduction="none")
            total = total + (nats * weights).sum() / weights.sum()
        return total

    def validation_step(self, batch: ClipBatch, index: int) -> None:
        """Which answers are right, by kind of tokens; or which patches."""
        tokens = self.encode(batch)
        if self.hparams["stage"] == "encoder":
            contents, labels = self._contents(tokens), batch.labels.flatten(1, 3)
            seen = labels[..., 0] > 0
            for name, head, target in zip(("color", "shape"), self.heads, labels[..., :2].unbind(-1), strict=True):
                right = (head(contents).argmax(-1) == target).float()
                self.scores[f"{name} of things"].append(right[seen])
                self.scores[f"{name} of nothing"].append(right[~seen])
            return
        for kind in self.mix:
            scores = self.model(self.reduced(tokens, kind, 32), batch.questions)
            right = (scores.argmax(-1) == batch.answers).float()
            self.scores[kind].append(right.flatten())
            for i, asked in enumerate(batch.asked):
                for j, question in enumerate(asked):
                    if kind in ("full", "vqtoken"):
                        self.scores[f"{kind}: {question.kind}"].append(right[i, j][None])

    def on_validation_epoch_end(self) -> None:
        """Shares of right answers; baselines and VQToken at 32 tokens."""
        self._log_scores("val")

    def test_step(self, batch: ClipBatch, index: int) -> None:
        """Answers about test clips, as `validation_step`."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Shares of right answers about the test clips."""
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        for name, parts in self.scores.items():
            self.log(f"{part}/{name.replace(' ', '_')}", torch.cat(parts).mean())
        self.scores.clear()
