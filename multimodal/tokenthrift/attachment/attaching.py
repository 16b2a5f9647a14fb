"""`attach`: checks its arguments, sets the hooks, and takes them out again."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal
from weakref import WeakSet

import torch
from torch import nn

from tokenthrift.attachment.choices import Budgets, Reducers, choose
from tokenthrift.attachment.families import find_model
from tokenthrift.attachment.handle import Attachment
from tokenthrift.budget import BudgetError

__all__ = ["attach"]

_ATTACHED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def attach(
    model: nn.Module,
    reducer: Reducers,
    budget: Budgets = None,
    *,
    total: int | None = None,
    modalities: Collection[str] | None = None,
    seconds: Sequence[float] | None = None,
    at: Literal["embeddings", "encoder"] = "embeddings",
) -> Iterator[Attachment]:
    """Reduces the media tokens of this model, and of no other, until the context is left.

    Every picture, clip and recording is an item of its own under the budget. A budget at or above native leaves outputs
    bit for bit as they were. Leaving, also by an exception, restores the model exactly.

    Args:
        model: A transformers model of a known family, bare, with a head, or wrapped (PEFT, torch.compile).
        reducer: Anything that keeps the width of the embeddings; a mapping from modalities to reducers; or the name of
            a training-free one (`reducer_from`), with a budget after a colon: "tome:25%".
        budget: Ceilings per item; a mapping from modalities; or a list with one budget for each item that every call
            reduces, in reading order, row by row.
        total: Most tokens of all items of a row (a prompt) together, shared by their native tokens when a call is
            made; `budget` then holds for each item besides.
        modalities: What is reduced, of "image", "video" and "audio"; all others stay bit for bit. If not given, the
            keys of a mapping, or what the reducer names in an attribute `modalities`, or all that the model reads. A
            call that then has nothing to reduce (a picture for a reducer of videos) gives a UserWarning.
        seconds: Durations of the items that every call reduces, in reading order, which `tokens_per_second` needs: the
            model does not know them.
        at: Where: "embeddings", between encoder and language model; or "encoder", inside or before a CLIP, SigLIP or
            Qwen vision tower as well, where one budget (or one a modality) holds. A tower that reads tiles or frames
            apart keeps each of them, or each clip, to the budget, then the item in the language model.

    Yields:
        The handle; its `usage` tells what the latest call with media used.

    Raises:
        BudgetError: A reducer does not honor a field of its budget.
        ValueError: The family is not supported, or a call is of a kind that cannot be shortened (see the message).
        RuntimeError: The model has a reducer attached already.
    """
    inner, family = find_model(model)
    choice = choose(reducer, budget, total, modalities, tuple(family.media))
    limits = list(choice.budgets.values()) if isinstance(choice.budgets, Mapping) else choice.budgets
    rate = next((limit.tokens_per_second for limit in limits if limit.tokens_per_second is not None), None)
    if rate is not None and seconds is None:
        raise BudgetError(
            f"tokens_per_second={rate} without seconds",
            "max_tokens, retention, or attach(..., seconds=...)",
            "a share such as 25%",
        )
    if at not in ("embeddings", "encoder"):
        raise ValueError(f"at is 'embeddings' or 'encoder', not {at!r}")
    if at == "encoder" and (
        not family.towers or total is not None or isinstance(budget, list | tuple) or rate is not None
    ):
        reason = "a total, a list of budgets and tokens_per_second need the prompt, which the encoder does not see"
        reason = (
            reason if family.towers else f"the encoder of {family.model_type} is not one that can be reduced inside"
        )
        raise ValueError(f"at='encoder': {reason}")
    if inner in _ATTACHED:
        raise RuntimeError(
            "this model has a reducer attached already; leave that context first, or attach a mapping from modalities "
            "to reducers"
        )
    handle = Attachment(inner, family, choice, seconds, warn=modalities is None, inside=at == "encoder")
    with ExitStack() as undo:
        # A graph that was compiled without the hooks, or with them, does not look whether they are there.
        undo.callback(_forget_graphs)
        _forget_graphs()
        _ATTACHED.add(inner)
        undo.callback(_ATTACHED.discard, inner)
        for step in handle.install():
            undo.callback(step)
        yield handle


def _forget_graphs() -> None:
    """Lets torch.compile trace again what it has compiled in this process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
