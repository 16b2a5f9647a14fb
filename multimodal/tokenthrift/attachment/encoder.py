"""Reduction inside or before the vision encoder: `attach(..., at="encoder")`.

A reducer works before the first layer: patches that it drops never enter the encoder, as EVS (arXiv 2510.14624) does
with static ones. A reducer with `between_layers` (ToMe, arXiv 2210.09461) works before every layer, and its caps fall
evenly from native to the budget. Behind the encoder every token is copied to the positions of its members, so that all
that follows (mergers, pooling, tiles with newlines) meets the lengths it expects; a position without a token is zero.

Two kinds of towers: rows of one picture, tile or frame each (CLIP, SigLIP), where frames that became short share a row,
and pictures and frames packed into one row (Qwen), where what is kept or dropped is the group of patches that becomes
one token of the language model.

Differs from the published code: ToMe compares attention keys and adds log(size) to the scores, EVS compares pixels;
here hidden states of the layer are compared and attention is as it was, so that any attention kernel serves. EVS keeps
the first frame whole; here the budget alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenthrift.budget import TokenBudget, TokenUsage
from tokenthrift.reducers.base import TokenReducer
from tokenthrift.tokens import TokenBatch

__all__ = ["EncoderRun", "Kept", "install_tower"]


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of an item: (n,) its positions among the native units, and its usage."""

    positions: Tensor
    usage: TokenUsage


@dataclass(slots=True)
class EncoderRun:
    """One call of an encoding method: the reducer, its budget, and the arguments by name; then what became of it."""

    modality: str
    reducer: TokenReducer
    budget: TokenBudget
    given: Mapping[str, Any]
    batch: TokenBatch | None = None
    """The units of every item as the latest stage left them."""
    native: list[int] = field(default_factory=list)
    permutation: Tensor | None = None
    homes: list[Tensor] = field(default_factory=list)
    """For towers of rows, by layer: (F, N) the slot in the flat (R * K) tokens for each native one, -1 for none."""
    mask: Tensor | None = None
    """Of the rows as the latest stage left them, where they need one."""

    def start(self, units: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> None:
        """Begins with the units (N_i, D) of every item."""
        self.batch = TokenBatch.from_items(units, grids=grids)
        self.native = [len(item) for item in units]

    @property
    def between(self) -> bool:
        """Whether there is a stage before every layer."""
        return bool(getattr(self.reducer, "between_layers", False))

    def step(self, layer: int, layers: int, hidden: Sequence[Tensor]) -> None:
        """The stage before a layer, for the hidden states of the units of every item."""
        assert self.batch is not None
        caps = [usage.used for usage in self.reducer.plan(self.native, self.budget)]
        if self.between:
            caps = [n - (n - cap) * (layer + 1) // layers for n, cap in zip(self.native, caps, strict=True)]
        fresh = TokenBatch.from_items(list(hidden), grids=self.batch.grids)
        batch = replace(self.batch, embeddings=fresh.embeddings) if layer else fresh
        self.batch = self.reducer.reduce(batch, [TokenBudget(max_tokens=cap) if cap else self.budget for cap in caps])

    def sources(self, i: int) -> Tensor:
        """(N,) int64: which of its tokens stands for each unit of item i, -1 for none."""
        assert self.batch is not None
        if self.batch.sources is not None:
            return self.batch.sources[i, : self.native[i]]
        positions = self.batch.positions[i][self.batch.mask[i]]
        found = positions.new_full((self.native[i],), -1)
        found[positions] = torch.arange(len(positions), device=found.device)
        return found

    def kept(self) -> list[Kept]:
        """What is left of every item."""
        if self.batch is None:
            return []
        real = zip(self.batch.positions, self.batch.mask, self.native, strict=True)
        return [Kept(p[m], TokenUsage(native=n, cap=int(m.sum()), used=int(m.sum()))) for p, m, n in real]


Current = Callable[[], EncoderRun | None]


def install_tower(tower: nn.Module, current: Current) -> list[Callable[[], None]]:
    """Sets the hooks of a tower that reduce while `current()` is a run; returns what undoes it.

    Raises:
        ValueError: The tower is of no kind that can be reduced.
    """
    parts: Any = tower
    if hasattr(tower, "blocks") and hasattr(tower, "merger"):
        return _install_packed(parts, current)
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    if encoder is None or not hasattr(encoder, "layers"):
        raise ValueError(f"{type(tower).__name__} cannot be reduced inside; attach without at='encoder'")
    return _install_rows(parts, encoder, current)


def _install_rows(tower: nn.Module, encoder: Any, current: Current) -> list[Callable[[], None]]:
    count = len(encoder.layers)

    def before_layer(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = current()
            if run is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            hidden, mask = _rows_stage(run, index, count, hidden)
            if mask is not None:
                args, kwargs = args[:1], {**kwargs, "attention_mask": mask}
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def after_encoder(module: nn.Module, args: Any, output: Any) -> Any:
        if (run := current()) is not None and run.homes:
            output["last_hidden_state"] = _to_native(output.last_hidden_state, run.homes[-1])
        return output

    def after_tower(module: nn.Module, args: Any, output: Any) -> Any:
        run = current()
        states = None if run is None else output.get("hidden_states")
        if run is not None and states is not None:
            # State i is what layer i - 1 gave, the first what layer 0 read; those that nobody selects are None.
            homes = [run.homes[max(i - 1, 0)] for i in range(count + 1)]
            reduced = zip(states[: count + 1], homes, strict=False)
            native = [None if state is None else _to_native(state, home) for state, home in reduced]
            output["hidden_states"] = (*native, *states[count + 1 :])
        return output

    hooks = [
        layer.register_forward_pre_hook(before_layer(i), with_kwargs=True) for i, layer in enumerate(encoder.layers)
    ]
    hooks += [encoder.register_forward_hook(after_encoder), tower.register_forward_hook(after_tower)]
    return [hook.remove for hook in hooks]


def _rows_stage(run: EncoderRun, layer: int, layers: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows (R, K, D) that a layer reads, and their additive mask (R, 1, K, K) where they need one."""
    if layer == 0:
        frames, length, _ = hidden.shape
        side = math.isqrt(length)
        patches = side * side
        videos = run.given.get("pixel_values_videos")
        depth = 1 if videos is None or run.between else videos.shape[1]
        grid = (depth, side, side)
        run.start(
            [rows.flatten(0, 1) for rows in hidden[:, length - patches :].split(depth)], [grid] * (frames // depth)
        )
        home = torch.arange(frames * length, device=hidden.device).view(frames, length)
        run.homes.append(home)
    home = run.homes[-1]
    if layer and not run.between:
        run.homes.append(home)
        return hidden, run.mask
    frames, length = home.shape
    patches = math.isqrt(length) ** 2
    leading = length - patches
    flat = hidden.flatten(0, 1)
    per_item = frames // len(run.native)
    assert run.batch is not None
    units = []
    for i, positions in enumerate(p[m] for p, m in zip(run.batch.positions, run.batch.mask, strict=True)):
        slots = home[i * per_item : (i + 1) * per_item, leading:].flatten()[positions]
        units.append(flat[slots])
    run.step(layer, layers, units)
    kept = [positions[mask] for positions, mask in zip(run.batch.positions, run.batch.mask, strict=True)]
    frame = torch.cat([positions // patches + i * per_item for i, positions in enumerate(kept)])
    counts = frame.bincount(minlength=frames)
    begins, width, height = _pack((counts + leading).tolist())
    begin = torch.tensor(begins, device=hidden.device)
    heads = begin[:, None] + torch.arange(leading, device=hidden.device)
    within = torch.arange(len(frame), device=hidden.device) - (counts.cumsum(0) - counts)[frame]
    slots = begin[frame] + leading + within
    packed = hidden.new_zeros(height * width, hidden.shape[2])
    packed[heads] = flat[home[:, :leading]]
    packed[slots] = torch.cat(run.batch.items()).to(hidden.dtype)
    owner = home.new_full((height * width,), -1)
    owner[heads] = torch.arange(frames, device=hidden.device)[:, None].expand_as(heads)
    owner[slots] = frame
    members = [
        torch.cat([own, own.new_full((1,), -1)])[run.sources(i)].view(per_item, patches)
        for i, own in enumerate(slots.split([len(positions) for positions in kept]))
    ]
    run.mask = _apart(owner.view(height, width), hidden.dtype)
    run.homes[layer:] = [torch.cat([heads, torch.cat(members)], dim=1)]
    return packed.view(height, width, -1), run.mask


def _pack(lengths: Sequence[int]) -> tuple[list[int], int, int]:
    """Lays frames into rows as wide as the longest, each into the first one with room, so that none is paid for twice.

    Returns:
        Where each frame begins in the flat rows, their width, and how many they are.
    """
    width, filled, begins = max(*lengths, 1), [0], []
    for length in lengths:
        row = next((i for i, used in enumerate(filled) if used + length <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        begins.append(row * width + filled[row])
        filled[row] += length
    return begins, width, len(filled)


def _apart(owner: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive mask (R, 1, K, K) that keeps tokens (R, K) to their own frame; None where a frame fills each row."""
    other = owner[:, :, None] != owner[:, None, :]
    if not other.any():
        return None
    return torch.zeros(other.shape, dtype=dtype, device=owner.device).masked_fill(other, torch.finfo(dtype).min)[
        :, None
    ]


def _to_native(states: Tensor, home: Tensor) -> Tensor:
    """(R, K, D) to (F, N, D)."""
    return states.flatten(0, 1)[home].masked_fill((home < 0)[..., None], 0)


def _install_packed(tower: Any, current: Current) -> list[Callable[[], None]]:
    group = tower.spatial_merge_size**2
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]

    def before_block(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = current()
            if run is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = _packed_stage(tower, run, index, len(tower.blocks), hidden, group)
            places = _places(run)
            patches = (places[:, None] * group + torch.arange(group, device=places.device)).flatten()
            kept = torch.zeros(sum(run.native) * group + 1, dtype=torch.int32, device=places.device)
            kept[patches + 1] = 1
            ends = kept.cumsum(0, dtype=torch.int32)[kwargs["cu_seqlens"].long()].unique_consecutive()
            changes: dict[str, Any] = {"cu_seqlens": ends}
            if kwargs.get("max_seqlen") is not None:
                changes["max_seqlen"] = int(ends.diff().max())
            changes["position_embeddings"] = tuple(table[patches] for table in kwargs["position_embeddings"])
            kwargs = {**kwargs, **changes}
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def after_merger(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        run = current()
        return output if run is None else _spread_units(run, output)

    hooks = [block.register_forward_pre_hook(before_block(i), with_kwargs=True) for i, block in enumerate(tower.blocks)]
    hooks += [merger.register_forward_hook(after_merger) for merger in mergers]
    return [hook.remove for hook in hooks]


def _packed_stage(tower: Any, run: EncoderRun, layer: int, layers: int, hidden: Tensor, group: int) -> Tensor:
    """The packed patches (P, D) that a block reads."""
    units = hidden.unflatten(0, (-1, group)).flatten(1)
    if layer == 0:
        grids = [
            (t, h // tower.spatial_merge_size, w // tower.spatial_merge_size)
            for t, h, w in run.given[f"{run.modality}_grid_thw"].tolist()
        ]
        run.permutation = _window_order(tower, run.given[f"{run.modality}_grid_thw"], units)
        raster = units if run.permutation is None else units[run.permutation.argsort()]
        run.start(raster.split([t * h * w for t, h, w in grids]), grids)
        items: Sequence[Tensor] = raster.split(run.native)
    elif not run.between:
        return hidden
    else:
        counts = [] if run.batch is None else [int(mask.sum()) for mask in run.batch.mask]
        items = units[_raster_order(run).argsort()].split(counts)
    run.step(layer, layers, items)
    assert run.batch is not None
    values: Tensor = torch.cat(run.batch.items()).to(hidden.dtype)[_raster_order(run)]
    patches: Tensor = values.unflatten(1, (group, -1)).flatten(0, 1)
    return patches


def _offsets(run: EncoderRun) -> list[int]:
    return [sum(run.native[:i]) for i in range(len(run.native))]


def _raster_places(run: EncoderRun) -> Tensor:
    """(u,) the native unit of every token, item by item."""
    assert run.batch is not None
    rows = zip(run.batch.positions, run.batch.mask, _offsets(run), strict=True)
    return torch.cat([positions[mask] + offset for positions, mask, offset in rows])


def _place_of(run: EncoderRun, units: Tensor) -> Tensor:
    """Where native units stand in the packed row, which may be ordered by windows."""
    return units if run.permutation is None else run.permutation.argsort()[units]


def _raster_order(run: EncoderRun) -> Tensor:
    """Which token, item by item, stands where in the packed row."""
    return _place_of(run, _raster_places(run)).argsort()


def _places(run: EncoderRun) -> Tensor:
    """(u,) where in the native packed row each token of the packed row stands."""
    return _place_of(run, _raster_places(run)).sort().values


def _spread_units(run: EncoderRun, output: Tensor) -> Tensor:
    """(u, D) merged units to all native ones, in the order of the packed row."""
    assert run.batch is not None
    raster = output[_raster_order(run).argsort()]
    counts = [int(mask.sum()) for mask in run.batch.mask]
    parts = []
    for i, values in enumerate(raster.split(counts)):
        sources = run.sources(i)
        parts.append(values[sources].masked_fill((sources < 0)[:, None], 0) if len(values) else output.new_zeros(0))
    native = torch.cat(parts)
    return native if run.permutation is None else native[run.permutation]


def _window_order(tower: Any, grids: Tensor, units: Tensor) -> Tensor | None:
    """(U,) which unit in raster order stands where, for towers with windows (Qwen2.5-VL)."""
    if not hasattr(tower, "window_size"):
        return None
    if hasattr(tower, "get_window_index"):  # early releases of transformers 5
        found: Tensor = torch.as_tensor(tower.get_window_index(grids)[0])
        return found.to(units.device)
    from transformers.vision_utils import get_vision_window_index

    order: Tensor = get_vision_window_index(
        grids,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )[0]
    return order.to(units.device)
