"""Active set with halo: a round reads the slots that are open or have changed, and their neighbors, beside kept keys.

Source: the local updates that Fast-dLLM's dual cache (arXiv 2505.22618, section 3.2) makes for a block, here for
whichever slots a round concerns: the work of an utterance follows its open slots, not rounds times length.

Differs from the dual cache: the slots need not be neighbors, what was read anew replaces what was kept, and the option
`refresh` says how often everything is read. With `refresh=1`, or without a halo, every round is the whole pass. Where
the mask hides the response from the prefix (`attention="prefix"`), a halo as wide as the response is exact too;
otherwise kept keys are an approximation, of the prefix and of slots outside of the halo.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.backbones.masked import Context, hinted
from tokenthrift.backbones.prefix import Keys, PrefixBackbone
from tokenthrift.padding import gather_rows

__all__ = ["ActiveBackbone"]


class ActiveBackbone:
    """A backbone and the context of a batch, as the `Predict` of the samplers; holds the state of one decoding.

    Args:
        backbone: a decoder; BERT and ModernBERT keep no keys.
        context: what the backbone made of the memory of each row.
        hints: (B, L) tokens of the draft in open slots, see `MaskedDiffusionBackbone.forward`.
        halo: slots on each side of an open or changed one that are read too; None reads all in every round.
        refresh: rounds after which everything is read again; None reads everything in the first alone.

    Raises:
        ValueError: a negative halo, a refresh below 1, or a model that keeps no keys.
    """

    def __init__(
        self,
        backbone: PrefixBackbone,
        context: Context,
        *,
        hints: Tensor | None = None,
        halo: int | None = 4,
        refresh: int | None = None,
    ) -> None:
        if (halo is not None and halo < 0) or (refresh is not None and refresh < 1):
            raise ValueError(f"halo {halo} must not be negative, refresh {refresh} must be at least 1")
        self.backbone, self.context, self.hints, self.halo, self.refresh = backbone, context, hints, halo, refresh
        self._round = 0
        self._rows: list[int] = []
        self._keys = Keys((), torch.empty(0), torch.empty(0))
        self._ids = self._said = torch.empty(0)

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Logits (R, W, vocab) of a round; see `samplers.Predict`. Those of slots that were not read are older."""
        known = {row: at for at, row in enumerate(self._rows)}
        now = rows.tolist()
        whole = self.halo is None or (self.refresh is not None and self._round % self.refresh == 0)
        self._round += 1
        hints = None if self.hints is None else self.hints[rows, : ids.shape[1]]
        if whole or not all(row in known for row in now):
            self._said, self._keys = self.backbone.read(ids, mask, self.context.select(rows), hints)
            if self.halo is not None and not self._keys.layers:
                raise ValueError(f"a {self.backbone.lm.config.model_type} keeps no keys: leave the halo out")
        else:
            self._keep(torch.tensor([known[row] for row in now], device=rows.device), ids.shape[1])
            self._update(ids, mask, self.context.mask[rows].sum(1), hints)
        self._rows, self._ids = now, ids.clone()
        return self.backbone.logits(self._said)

    def _keep(self, index: Tensor, width: int) -> None:
        """Forgets the rows that left the batch, and slots that no row has anymore."""
        layers = tuple((key[index], value[index]) for key, value in self._keys.layers)
        self._keys = Keys(layers, self._keys.positions[index], self._keys.exists[index])
        self._ids, self._said = self._ids[index, :width], self._said[index, :width]

    def _update(self, ids: Tensor, mask: Tensor, prefix: Tensor, hints: Tensor | None) -> None:
        """Reads the active slots beside the keys of the others."""
        halo = self.halo or 0
        concerned = mask & ((ids == self.backbone.mask_id) | (ids != self._ids))
        near = F.max_pool1d(concerned[:, None].float(), 2 * halo + 1, 1, halo)[:, 0] > 0
        active = near & mask
        most = int(active.sum(1).max())
        slots = (~active).int().argsort(dim=1, stable=True)[:, :most]
        exists = active.gather(1, slots)
        # Padding of the active set stands behind everything, where nothing is.
        positions = torch.where(exists, prefix[:, None] + slots, int(self._keys.positions.max()) + 1)
        same = self._keys.positions[:, None] == positions[..., None]
        same &= self._keys.exists[:, None] & exists[..., None]
        # A slot that was pruned has keys still; nobody looks at them.
        gone = self._keys.positions >= (prefix + mask.sum(1))[:, None]
        past = Keys(self._keys.layers, self._keys.positions, self._keys.exists & ~same.any(1) & ~gone)
        embeddings = self.backbone.embed(ids)
        if hints is not None:
            embeddings = hinted(embeddings, self.backbone.embed(hints), ids, hints, self.backbone.mask_id)
        hidden, found = self.backbone.run(gather_rows(embeddings, slots), positions, exists, prefix, past)
        row, at = exists.nonzero(as_tuple=True)
        column, slot = same.int().argmax(2)[row, at], slots[row, at]
        before = past.positions.shape[1]
        layers = []
        for (key, value), (all_keys, all_values) in zip(past.layers, found.layers, strict=True):
            key, value = key.clone(), value.clone()
            key[row, :, column] = all_keys[row, :, before + at]
            value[row, :, column] = all_values[row, :, before + at]
            layers.append((key, value))
        self._keys = Keys(tuple(layers), self._keys.positions, self._keys.exists)
        # The position before a slot says it where the logits are shifted; the last one says nothing.
        said = slot + int(self.backbone.shifted)
        inside = said < ids.shape[1]
        self._said = self._said.clone()
        self._said[row[inside], said[inside]] = hidden[row[inside], at[inside]]
