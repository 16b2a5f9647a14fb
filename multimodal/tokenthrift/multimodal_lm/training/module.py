"""Training of a `MultimodalLM`: projectors first, alone and without the language model, then projectors and LoRA.

Source: LLaVA (arXiv 2304.08485), section 4.2, whose first stage trains the projector through the whole language model.
What differs: stage "align" needs no pass of the language model. The mean of an item's projected tokens should point to
the embedding of its answer, against those of the other answers of the task, as CLIP (arXiv 2103.00020) does with
captions. A frozen language model then finds words where it expects words, and the second stage is short. In stage
"answer" the loss is that of the answers, and every item of every prompt has a count of tokens drawn anew, so that one
model reads all budgets.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.budget import BudgetLike
from tokenthrift.config import from_plain, to_plain
from tokenthrift.multimodal_lm.config import LoraConfig, MultimodalConfig, PrefixConfig, describe
from tokenthrift.multimodal_lm.language_model import fill
from tokenthrift.multimodal_lm.model import MultimodalLM
from tokenthrift.multimodal_lm.questions import Example, prompt_of
from tokenthrift.sources import fetch
from tokenthrift.tokens import TokenBatch
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import gathered
from tokenthrift.training.start_weights import load_start_weights
from tokenthrift.training.text_log import log_texts

__all__ = ["MultimodalModule"]

_OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.01, warmup_steps=20, min_lr=1e-5)
_LORA = LoraConfig()
_TEMPERATURE = 0.07
_SHOWN = 16  # answers of a validation that are logged as text


def of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows, in groups of which none has a row of more than twice the length of another."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[i] <= 2 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class MultimodalModule(L.LightningModule):
    """Trains a `MultimodalLM` on batches of `MultimodalDataModule`.

    Args:
        language_model: folder or Hub id of the frozen language model, with its tokenizer.json.
        prefixes: systems in front of it by kind, as `{image: {source: ..., token_size: ...}}`.
        stage: "align" trains projectors without the language model, "answer" projectors and LoRA with it.
        tasks: `tasks.json` of the data, the answers of each task.
        name: how a saved model names the language model, if not as `language_model`.
        licence: of the language model.
        layers: take only its first layers, where it is too large; all if not given.
        lora: adapters.
        projector_hidden_size: width inside a projector.
        token_counts: counts that the items of a kind get in training, each as often; all native tokens if not given.
        start_from: checkpoint of a training, or folder of a model, whose weights training starts from.
        beside: folder that the saved model will have, against which the names of prefixes are read.
        lora_learning_rate: of the adapters; that of `optim` if not given.
        optim: how it is trained.
    """

    def __init__(
        self,
        language_model: str,
        prefixes: dict[str, PrefixConfig],
        tasks: str,
        stage: Literal["align", "answer"] = "answer",
        name: str | None = None,
        licence: str = "",
        layers: int | None = None,
        lora: LoraConfig = _LORA,
        projector_hidden_size: int = 512,
        token_counts: dict[str, list[int]] | None = None,
        start_from: str | None = None,
        beside: str = "model_cards/multimodal-tiny",
        lora_learning_rate: float | None = None,
        optim: OptimConfig = _OPTIM,
    ) -> None:
        super().__init__()
        # A checkpoint holds plain data, so that it is read without running code.
        self.optim, lora = from_plain(OptimConfig, to_plain(optim)), from_plain(LoraConfig, to_plain(lora))
        systems = {kind: from_plain(PrefixConfig, to_plain(prefix)) for kind, prefix in prefixes.items()}
        self.save_hyperparameters(ignore=["prefixes", "lora", "optim"])
        self.save_hyperparameters(
            {n: to_plain(v) for n, v in (("prefixes", systems), ("lora", lora), ("optim", optim))}
        )
        tokenizer = Tokenizer.from_file(str(fetch(language_model, ("tokenizer.json",)) / "tokenizer.json"))
        sizes = describe(language_model, licence=licence, name=name, layers=layers)
        end = sizes.config.get("eos_token_id")
        config = MultimodalConfig(
            language_model=sizes,
            prefixes=systems,
            projector_hidden_size=projector_hidden_size,
            lora=lora,
            end_id=end if isinstance(end, int) else 0,
        )
        self.save_hyperparameters({"config": to_plain(config)})
        self.model = MultimodalLM(config, tokenizer, Path(beside))
        fill(self.model.lm, sizes, language_model)
        self.tasks: dict[str, list[str]] = json.loads(Path(tasks).read_text(encoding="utf-8"))
        if start_from is not None:
            load_start_weights(self, start_from)
        for name_, parameter in self.model.lm.named_parameters():
            parameter.requires_grad_(stage == "answer" and "lora_" in name_)
        self.scores: dict[str, list[bool]] = defaultdict(list)
        self.samples: list[str] = []

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay."""
        h: Any = self.hparams
        groups = parameter_groups(self.model.projectors, self.optim)
        adapters = [(n, p) for n, p in self.model.lm.named_parameters() if p.requires_grad]
        groups += parameter_groups(adapters, self.optim, learning_rate=h.lora_learning_rate)
        return optimizer_and_schedule(groups, self.optim, int(self.trainer.estimated_stepping_batches))

    def counts(self, example: Example) -> dict[str, BudgetLike]:
        """How many tokens each kind gets in this example; None keeps all."""
        rng, counts = random.Random(example.seed), self.hparams["token_counts"] or {}
        return {kind: rng.choice(counts[kind]) if kind in counts else None for kind, _ in example.media}

    def reduced(self, examples: list[Example], kind: str) -> TokenBatch:
        """The items of a kind that questions are about, each with a count of its own, projected."""
        items = [tokens for e in examples for name, tokens in e.media if name == kind == e.kind]
        budgets = [self.counts(e)[kind] for e in examples if e.kind == kind]
        tokens = TokenBatch.cat([item.to(self.model.weight.device) for item in items])
        return self.model.project(kind, self.model.prefix(kind).reduce(tokens, budgets))

    def training_step(self, batch: list[Example], index: int) -> Tensor:
        """The loss of a batch."""
        loss = self.alignment(batch) if self.hparams["stage"] == "align" else self.answering(batch)
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def alignment(self, batch: list[Example]) -> Tensor:
        """Nats per item of choosing its answer among those of its task; see the head of this file."""
        losses = []
        for kind in sorted({example.kind for example in batch}):
            own = [example for example in batch if example.kind == kind]
            for row, example in zip(self.pooled(own, kind), own, strict=True):
                words = self.word_embeddings(self.tasks[example.task])
                target = torch.tensor(self.tasks[example.task].index(example.answer), device=row.device)
                losses.append(F.cross_entropy(F.normalize(words, dim=-1) @ row / _TEMPERATURE, target))
        return torch.stack(losses).mean()

    def pooled(self, examples: list[Example], kind: str) -> Tensor:
        """(B, H) directions of the means of projected items."""
        tokens = self.reduced(examples, kind)
        means = tokens.embeddings.sum(1) / tokens.mask.sum(1, keepdim=True)
        return F.normalize(means, dim=-1)

    def word_embeddings(self, words: list[str]) -> Tensor:
        """(n, H) mean embeddings of words as they stand in a text."""
        return torch.stack([self.model.embed(self.model.token_ids(f" {word}")).mean(0) for word in words]).detach()

    def answering(self, batch: list[Example]) -> Tensor:
        """Nats per token of the answers; a group of prompts of like length counts by how many it holds."""
        prepared = self.model.prepare([prompt_of(e) for e in batch], [self.counts(e) for e in batch])
        losses = []
        # One clip with all its tokens would pad every other prompt to twenty times its length.
        for group in of_like_length([len(row) for row in prepared.rows]):
            loss = self.model.loss([prepared.rows[i] for i in group], [f" {batch[i].answer}" for i in group])
            losses.append(loss * (len(group) / len(batch)))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def validation_step(self, batch: list[Example], index: int) -> None:
        """Which answers are right, by task."""
        if self.hparams["stage"] == "align":
            for kind in sorted({example.kind for example in batch}):
                own = [example for example in batch if example.kind == kind]
                for row, example in zip(self.pooled(own, kind), own, strict=True):
                    words = F.normalize(self.word_embeddings(self.tasks[example.task]), dim=-1)
                    found = self.tasks[example.task][int((words @ row).argmax())]
                    self._note(example, found)
            return
        answers = self.model.answer(
            [prompt_of(e) for e in batch], dict.fromkeys(self.model.config.prefixes, 16), max_new_tokens=4
        )
        for example, answer in zip(batch, answers, strict=True):
            self._note(example, answer.text)

    def _note(self, example: Example, found: str) -> None:
        """Whether an answer is right, and the answer itself."""
        self.scores[example.task].append(found == example.answer)
        self.samples.append(f"{example.task}: '{example.answer}' answered '{found}'")

    def on_validation_epoch_end(self) -> None:
        """Shares of right answers over the questions of all processes; some of the answers."""
        log_texts(self, "val/answers", self.samples[:_SHOWN])
        self._log_scores("val")

    def test_step(self, batch: list[Example], index: int) -> None:
        """Answers to test questions, as `validation_step`."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Shares of right answers to test questions."""
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        totals: dict[str, list[bool]] = defaultdict(list)
        for share in gathered([dict(self.scores)]):
            for task, right in share.items():
                totals[task] += right
        for task, right in sorted(totals.items()):
            self.log(f"{part}/{task}", sum(right) / len(right), sync_dist=True)
        whole = [hit for right in totals.values() for hit in right]
        self.log(f"{part}/all", sum(whole) / max(len(whole), 1), sync_dist=True)
        self.scores.clear()
        self.samples.clear()
