"""MultimodalLM: any causal language model that reads pictures, clips, recordings and lips in one window.

    model = MultimodalLM.from_pretrained("model_cards/multimodal-tiny")
    answers = model.answer([[Media("image", photo), Media("audio", samples), "Question: ..."]], total=64)

Source: LLaVA (arXiv 2304.08485) for projected features as a prefix, LoRA (arXiv 2106.09685) for the adapters. What
differs: the features are the tokens of systems that keep to a budget, one window is divided over the media of a prompt
(by demand, alike, or by measured value), and the same weights read every budget. The language model is not wrapped:
`model.lm.generate(**model.inputs(prompts, total=64), num_beams=4)` is transformers' own `generate`, with its batches,
beams, sampling and caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from tokenthrift.auto.processing import tokenizer_files
from tokenthrift.budget import BudgetLike, TokenBudget, TokenUsage
from tokenthrift.external import allow_missing, drop_external_keys
from tokenthrift.hub import HubModel
from tokenthrift.multimodal_lm.config import MultimodalConfig
from tokenthrift.multimodal_lm.language_model import build, exact_buffers, fill
from tokenthrift.multimodal_lm.prompts import Answer, Media, Prepared, Prompt
from tokenthrift.padding import pad_rows
from tokenthrift.prefixes import Prefix, PrefixProjector, load_prefix
from tokenthrift.quality import QUALITY, QualityCurve, read_quality
from tokenthrift.sources import beside
from tokenthrift.tokens import TokenBatch
from tokenthrift.window import Split, Window, WindowItem, WindowPlan

__all__ = ["MultimodalLM"]

Budgets: TypeAlias = BudgetLike | Mapping[str, BudgetLike]
"""Ceilings for every medium of a prompt, or for those of each kind."""
_LANGUAGE_MODEL: ContextVar[str | Path | None] = ContextVar("language_model", default=None)


class MultimodalLM(HubModel):
    """A frozen language model with LoRA, and a projector for each kind of medium.

    Args:
        config: what it is made of.
        tokenizer: of the language model, in the format of the tokenizers library.
        base_dir: the model's folder, beside which the language model and the systems are looked for first.
    """

    system: ClassVar[str] = "multimodal_lm"
    config_class: ClassVar[type] = MultimodalConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    config: MultimodalConfig

    def __init__(self, config: MultimodalConfig, tokenizer: Tokenizer, base_dir: Path | None = None) -> None:
        super().__init__(config)
        self.tokenizer, self.base_dir = tokenizer, base_dir
        self.lm = build(config.language_model, config.lora)
        size = cast(Tensor, self.lm.get_input_embeddings().weight).shape[1]
        self.projectors = nn.ModuleDict(
            {
                kind: PrefixProjector(prefix.token_size, config.projector_hidden_size, size)
                for kind, prefix in config.prefixes.items()
            }
        )
        self._prefixes: dict[str, Prefix] = {}
        self._hub_options: dict[str, Any] = {}
        if config.language_model.source is not None:
            self.register_state_dict_post_hook(partial(drop_external_keys, ("lm",)))  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(partial(allow_missing, ("lm",)))  # type: ignore[no-untyped-call]
        self.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, language_model: str | Path | None = None, **options: Any) -> Self:
        """See `HubModel.from_pretrained`.

        Args:
            source: a folder, or `owner/name` on the Hub.
            language_model: folder or Hub id of the frozen language model, in place of the one that the model names.
            options: as there.
        """
        mark = _LANGUAGE_MODEL.set(language_model)
        try:
            return super().from_pretrained(source, **options)
        finally:
            _LANGUAGE_MODEL.reset(mark)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The tokenizer, and the model's folder."""
        return {"tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")), "base_dir": folder}

    def write_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """For `AutoTokenizer` and `AutoProcessor` of transformers."""
        return tokenizer_files()

    def load_external(self, **options: Any) -> None:
        """Fills the language model from its source."""
        self._hub_options = options  # of the systems in front, which are loaded when they are first asked for
        named = self.config.language_model.source
        if named is not None:
            fill(self.lm, self.config.language_model, _LANGUAGE_MODEL.get() or beside(self.base_dir, named), **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = exact_buffers(self.lm)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (module, name), value in kept.items():
            if getattr(module, name).dtype != value.dtype:
                setattr(module, name, value.to(getattr(module, name).device))
        return self

    @property
    def weight(self) -> Tensor:
        """A tensor of the language model: its device and precision are those of the computation."""
        return cast(Tensor, self.lm.get_input_embeddings().weight)

    @property
    def curves(self) -> dict[str, QualityCurve]:
        """Measured quality against tokens by kind, of `quality.json`; empty where there is none."""
        file = None if self.base_dir is None else self.base_dir / QUALITY
        return read_quality(file) if file is not None and file.is_file() else {}

    def prefix(self, kind: str) -> Prefix:
        """The system that encodes a kind of media, loaded when it is first asked for; without weights on "meta".

        Raises:
            ValueError: the model reads no such media.
        """
        self._check_kind(kind)
        if kind not in self._prefixes:
            source = beside(self.base_dir, self.config.prefixes[kind].source)
            named = None if kind in ("image", "video") else kind
            meta = self.weight.is_meta
            options = {} if meta else {"device": self.weight.device, **self._hub_options}
            self._prefixes[kind] = load_prefix(source, kind=named, weights=not meta, **options)
        return self._prefixes[kind]

    def _check_kind(self, kind: str) -> None:
        if kind not in self.config.prefixes:
            raise ValueError(f"this model reads {', '.join(self.config.prefixes)}, not {kind}")

    def use_prefix(self, prefix: Prefix) -> None:
        """Puts a system in front, in place of the one that the configuration names.

        Raises:
            ValueError: the model reads no such media, or its tokens have another width.
        """
        named = self.config.prefixes.get(prefix.kind)
        if named is None or named.token_size != prefix.token_size:
            raise ValueError(f"the configuration has no prefix of kind {prefix.kind} and width {prefix.token_size}")
        self._prefixes[prefix.kind] = prefix

    def encode(self, prompts: Sequence[Prompt]) -> list[list[str | TokenBatch]]:
        """The parts of prompts with all media as native tokens; media of a kind are encoded together."""
        waiting: dict[str, list[tuple[int, int]]] = {}
        parts: list[list[Any]] = [list(prompt) for prompt in prompts]
        for i, row in enumerate(parts):
            for j, part in enumerate(row):
                if isinstance(part, Media):
                    self._check_kind(part.kind)
                    if isinstance(part.value, TokenBatch):
                        row[j] = part.value
                    else:
                        waiting.setdefault(part.kind, []).append((i, j))
        for kind, places in waiting.items():
            tokens = self.prefix(kind).encode([parts[i][j].value for i, j in places])
            for row_number, (i, j) in enumerate(places):
                parts[i][j] = tokens.select([row_number])
        return parts

    def window(
        self,
        prompt: Prompt,
        total: int,
        *,
        split: Split = "demand",
        answer: int = 0,
        curves: Mapping[str, QualityCurve] | None = None,
    ) -> WindowPlan:
        """What every part of a prompt gets; see `Window`.

        Args:
            prompt: text and media; of media without encoded tokens, `value` may be an `ItemSize` instead.
            total: tokens of the window.
            split: how they are shared; "value" needs `quality.json` beside the model.
            answer: tokens kept free.
            curves: quality against tokens by kind, in place of those of `quality.json`.

        Raises:
            BudgetError: the prompt does not fit.
        """
        if curves is None:
            curves = self.curves if split == "value" else {}
        items = []
        for part in prompt:
            if isinstance(part, str):
                items.append(WindowItem.text(part, len(self.token_ids(part))))
            else:
                size: Any = part.value.item_sizes()[0] if isinstance(part.value, TokenBatch) else part.value
                items.append(
                    WindowItem.of(
                        self.prefix(part.kind), size, kind=part.kind, weight=part.weight, curve=curves.get(part.kind)
                    )
                )
        return Window(total, items, split=split, reserve=answer).plan()

    def prepare(
        self,
        prompts: Sequence[Prompt],
        budget: Budgets | Sequence[Budgets] = None,
        *,
        total: int | None = None,
        split: Split = "demand",
        answer: int = 0,
    ) -> Prepared:
        """Prompts as embeddings.

        Args:
            prompts: text and media each.
            budget: ceilings for every medium, or a mapping from kinds to ceilings; or a list with one of these for each
                prompt.
            total: tokens of each prompt, text included, in place of a budget.
            split: how the total is shared.
            answer: tokens of the total kept free for the answer.

        Raises:
            BudgetError: the budget cannot be honored, or a prompt does not fit its total.
            ValueError: a medium that the model does not read, a budget and a total at once, or an empty prompt.
        """
        if total is not None and budget is not None:
            raise ValueError("give a budget for each medium or a total for each prompt, not both")
        parts = self.encode(prompts)
        kinds = [[None if isinstance(p, str) else p.kind for p in prompt] for prompt in prompts]
        limits: list[list[BudgetLike]]
        if total is None:
            each = list(budget) if isinstance(budget, list | tuple) else [budget] * len(prompts)
            if len(each) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(each)} budgets; give one for all, or one for each")
            limits = [[self._limit(own, kind) for kind in row] for own, row in zip(each, kinds, strict=True)]
        else:
            limits = []
            for prompt, row in zip(prompts, parts, strict=True):
                encoded: Any = [
                    part if isinstance(part, str) else Media(part.kind, value, part.weight)
                    for part, value in zip(prompt, row, strict=True)
                ]
                limits.append([*self.window(encoded, total, split=split, answer=answer).budgets])
        projected = self._project(parts, kinds, limits)
        rows, usage = [], []
        for row, own in zip(parts, projected, strict=True):
            if not row:
                raise ValueError("a prompt needs at least a word or a medium")
            media = iter(own)
            used: list[TokenUsage] = []
            pieces = []
            for part in row:
                if isinstance(part, str):
                    pieces.append(self.embed(self.token_ids(part)))
                else:
                    embeddings, one = next(media)
                    pieces.append(embeddings)
                    used.append(one)
            rows.append(torch.cat(pieces))
            usage.append(tuple(used))
        return Prepared(rows, usage)

    def _limit(self, budget: Any, kind: str | None) -> BudgetLike:
        """The ceilings of a medium, of those for every kind."""
        by_kind = isinstance(budget, Mapping) and set(budget) <= set(self.config.prefixes)
        limit: BudgetLike = budget.get(kind) if by_kind else budget
        return limit

    def _project(
        self,
        parts: Sequence[Sequence[Any]],
        kinds: Sequence[Sequence[str | None]],
        limits: Sequence[Sequence[BudgetLike]],
    ) -> list[list[tuple[Tensor, TokenUsage]]]:
        """Reduced and projected media of every prompt, in order; those of a kind together."""
        found: dict[tuple[int, int], tuple[Tensor, TokenUsage]] = {}
        for kind in self.config.prefixes:
            places = [(i, j) for i, row in enumerate(kinds) for j, own in enumerate(row) if own == kind]
            if not places:
                continue
            tokens = TokenBatch.cat([parts[i][j].to(self.weight.device) for i, j in places])
            budgets = [TokenBudget.parse(limits[i][j]) for i, j in places]
            reduced = self.project(kind, self.prefix(kind).reduce(tokens, budgets))
            found |= dict(zip(places, zip(reduced.items(), reduced.usage, strict=True), strict=True))
        return [[found[i, j] for j, kind in enumerate(row) if kind is not None] for i, row in enumerate(kinds)]

    def project(self, kind: str, tokens: TokenBatch) -> TokenBatch:
        """Tokens of a kind, native or reduced, as embeddings of the language model."""
        projected: TokenBatch = self.projectors[kind](tokens)
        return projected

    def inputs(self, prompts: Sequence[Prompt], budget: Any = None, **options: Any) -> dict[str, Tensor]:
        """What `lm.generate` and `lm.forward` take: `inputs_embeds` and `attention_mask`, padded on the left."""
        embeddings, mask = pad_rows(self.prepare(prompts, budget, **options).rows, side="left")
        return {"inputs_embeds": embeddings, "attention_mask": mask.long()}

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Prompt],
        budget: Any = None,
        *,
        total: int | None = None,
        split: Split = "demand",
        max_new_tokens: int = 16,
        **settings: Any,
    ) -> list[Answer]:
        """Writes an answer to every prompt; the result of each is that of the prompt alone.

        Args:
            prompts: text and media each.
            budget: see `prepare`.
            total: tokens of each prompt and its answer.
            split: how the total is shared.
            max_new_tokens: most tokens of an answer.
            settings: of transformers' `generate`, such as `num_beams`.
        """
        prepared = self.prepare(
            prompts, budget, total=total, split=split, answer=0 if total is None else max_new_tokens
        )
        embeddings, mask = pad_rows(prepared.rows, side="left")
        end = self.config.end_id
        ids = cast(Any, self.lm).generate(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            **{"eos_token_id": end, "pad_token_id": end, "do_sample": False, **settings},
        )
        texts = [self.text_of(row[: row.index(end)] if end in row else row) for row in ids.tolist()]
        return [Answer(text, usage) for text, usage in zip(texts, prepared.usage, strict=True)]

    def loss(self, rows: Sequence[Tensor], answers: Sequence[str]) -> Tensor:
        """Mean nats per token of given answers and their ends.

        Args:
            rows: (L_i, H) of each prompt, as `prepare` makes them.
            answers: one for each.
        """
        ids = [torch.tensor([*self.token_ids(text), self.config.end_id], device=self.weight.device) for text in answers]
        whole, mask = pad_rows([torch.cat([row, self.embed(own[:-1])]) for row, own in zip(rows, ids, strict=True)])
        states = self.lm.base_model(inputs_embeds=whole, attention_mask=mask.long(), use_cache=False)[0]
        said = torch.cat(
            [
                states[i, len(row) - 1 : len(row) - 1 + len(own)]
                for i, (row, own) in enumerate(zip(rows, ids, strict=True))
            ]
        )
        head = cast(nn.Module, self.lm.get_output_embeddings())
        return F.cross_entropy(head(said).float(), torch.cat(ids))

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """(n, H) embeddings of token ids."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.weight.device)
        return cast(Tensor, self.lm.get_input_embeddings()(ids))

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text on its own, neither start nor end added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, without surrounding space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
