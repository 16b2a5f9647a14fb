"""Ragged batches: an utterance leaves the batch in the call that finishes it, and the next one enters at once.

Source: continuous batching of served language models (Orca, OSDI 2022), which the published loops of diffusion language
models do not have: they decode one utterance, or a batch that ends with its slowest row.

Each utterance has a run of its own, so any sampler serves and the result is that of `sample` for the utterance alone,
as far as the model keeps rows apart. Only the calls of the model are made together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.loop import Call, Canvas, Hook, Predict, Run, Sampled, Sampler, TokenIds
from tokenthrift.padding import pad_rows

__all__ = ["sample_ragged"]


@torch.no_grad()
def sample_ragged(
    predict: Predict,
    canvases: Sequence[Canvas],
    sampler: Sampler | Sequence[Sampler],
    tokens: TokenIds,
    *,
    max_rows: int,
    max_rounds: int | None = None,
    trace: Hook | None = None,
) -> list[Sampled]:
    """Decides every MASK of many utterances, some of them at a time.

    Args:
        predict: the forward pass; its `rows` index `canvases`.
        canvases: where each utterance starts, one row each.
        sampler: the algorithm, or that of each utterance.
        tokens: the special ids.
        max_rows: most utterances in a call. With guidance each of them is two rows.
        max_rounds: most calls for an utterance; the last one commits every slot that is still open.
        trace: called after every call of the model with the ids of the utterances that it read.

    Returns:
        The outcome for each canvas.

    Raises:
        ValueError: a canvas of several rows, `max_rows` or `max_rounds` below 1, options that do not fit a canvas, or
            not as many samplers as canvases.
        TypeError: the sampler has a cache, whose windows differ between utterances.
    """
    if max_rows < 1 or (max_rounds is not None and max_rounds < 1):
        raise ValueError(f"max_rows {max_rows} and max_rounds {max_rounds} must be at least 1")
    if any(len(canvas.ids) != 1 for canvas in canvases):
        raise ValueError("a ragged batch has one canvas for each utterance, of one row")
    samplers = [sampler] * len(canvases) if isinstance(sampler, Sampler) else sampler
    if len(samplers) != len(canvases):
        raise ValueError(f"{len(canvases)} utterances but {len(samplers)} samplers; give one for all, or one for each")
    waiting = list(range(len(canvases)))[::-1]
    active: dict[int, Run] = {}
    calls: dict[int, Call] = {}
    out: dict[int, Sampled] = {}
    while waiting or active:
        while waiting and len(active) < max_rows:
            at = waiting.pop()
            active[at] = samplers[at].begin(
                canvases[at], tokens, torch.Generator(canvases[at].ids.device).manual_seed(0)
            )
            _request(at, active, calls, out, max_rounds)
        if calls:
            _step(predict, calls, active, tokens, max_rounds, trace)
            calls.clear()
            for at in list(active):
                _request(at, active, calls, out, max_rounds)
    return [out[at] for at in range(len(canvases))]


def _request(
    at: int, active: dict[int, Run], calls: dict[int, Call], out: dict[int, Sampled], max_rounds: int | None
) -> None:
    """Notes what an utterance wants to read next, or its outcome where it is done."""
    run = active[at]
    call = run.request() if max_rounds is None or run.calls < max_rounds else None
    if call is None:
        out[at] = active.pop(at).result()
    else:
        calls[at] = call


def _step(
    predict: Predict,
    calls: dict[int, Call],
    active: dict[int, Run],
    tokens: TokenIds,
    max_rounds: int | None,
    trace: Hook | None,
) -> None:
    """One call of the model for all utterances of the batch."""
    if any(call.refresh or call.window for call in calls.values()):
        raise TypeError(
            "a sampler that reuses keys and values reads windows, which utterances do not share: cache='none'"
        )
    ids, _ = pad_rows([row for call in calls.values() for row in call.ids], value=tokens.eos)
    mask, _ = pad_rows([row for call in calls.values() for row in call.mask], value=False)
    rows = torch.tensor([at for at, call in calls.items() for _ in call.ids], device=ids.device)
    logits = predict(ids, mask, rows)
    first = 0
    for at, call in calls.items():
        run, count = active[at], len(call.ids)
        own: Tensor = logits[first : first + count, : call.ids.shape[1]]
        run.calls += 1
        run.step(call, own, run.calls == max_rounds)
        first += count
    if trace is not None:
        trace(Call(ids, mask, rows), logits, pad_rows([active[at].ids[0] for at in calls], value=tokens.eos)[0])
