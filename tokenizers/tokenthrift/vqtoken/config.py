"""The configuration of a VQToken model, as plain data.

Source: VQToken (arXiv 2503.16980). The published code keeps its method, K and mode in source edits (2025) or in fields
of the language model's configuration (2026); the fields here have the names of the latter, without their prefix
`vqtoken_`, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from tokenthrift.config import ConfigError, check_within

__all__ = ["AttentionConfig", "VQTokenConfig", "upgrade_vqtoken_config"]

_DEFAULTS: Final = {"corrected": (1, 256, 20), "released": (12, 32, 50), "released_2025": (12, 32, 50)}
"""Values of `min_clusters`, `max_clusters` and `max_iterations` where they are not given."""

_VERSION_1: Final = {
    "codes": "code_type",
    "choose": "selection_method",
    "least": "min_clusters",
    "most": "max_clusters",
    "iterations": "max_iterations",
}
_ATTENTION_VERSION_1: Final = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "patches": "num_patches",
}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """VQ-attention, which lets the codes read the token hash."""

    hidden_size: int
    """Width of the tokens."""
    num_attention_heads: int = 8
    """Heads of the self-attention and of the cross-attention."""
    intermediate_size: int = 2048
    """Width inside the feed-forward part; 2048 in the published model."""
    num_patches: int = 729
    """Tokens of a frame. Only the published attention reads it; its queries are rows of the index map."""

    def __post_init__(self) -> None:
        ranges = {"hidden_size": 16_384, "num_attention_heads": 128, "intermediate_size": 65_536, "num_patches": 65_536}
        for name, high in ranges.items():
            check_within(f"attention.{name}", getattr(self, name), 1, high)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"attention.hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class VQTokenConfig:
    """A whole model. The defaults need no weights.

    `compat="released"` alone gives the published values of every field below it.
    """

    compat: Literal["corrected", "released", "released_2025"] = "corrected"
    """"released" clusters, selects K and attends as the published code of 2026, "released_2025" as that of 2025."""
    attention: AttentionConfig | None = None
    """VQ-attention; None returns the codes as they are ("centroids" in the published configuration)."""
    code_type: Literal["mean", "medoid"] = "mean"
    """What stands for a cluster: the mean of its tokens at their own scale, or its medoid, a real token."""
    selection_method: Literal["fixed", "gain", "elbow", "silhouette"] = "fixed"
    """How many codes a clip gets: as many as the budget allows, or fewer by what each explains ("gain") or by one of
    the published rules. A budget with a target error takes the fewest codes that reach it instead of "fixed"."""
    min_gain: float = 0.005
    """With "gain": share of the clip's scatter that a code has to explain which the others leave."""
    min_clusters: int = cast(int, None)
    """Fewest codes that a rule may select; if not given 1, or 12 as published with a released `compat`."""
    max_clusters: int = cast(int, None)
    """Most codes that a rule or a target error may select; if not given 256, or 32 as published."""
    max_iterations: int = cast(int, None)
    """Most k-means passes over the tokens; if not given 20, or 50 as published. The published search over K always
    stops its fits at 100."""
    outlier_share: float = 0.0
    """Share of a clip's codes around the tokens that are least like any other code, so that what is rare keeps a code
    of its own; the others are k-means' (`adaptive.with_outliers`). Which of the two serves better depends on what is
    asked: see the table of real clips in the documentation."""
    time_share: float = 0.0
    """How much of the likeness of two tokens is when they are, not what they show (`token_hash.with_time`). With it a
    code is of a part of the clip, so its position says more, and the order of events survives; without it tokens of all
    frames share codes, which is what saves most where nothing moves. Errors are then of tokens with their times."""
    seed: int = 0
    """Seed of the published k-means++, which in 2025 nothing seeded. The corrected clustering draws nothing."""

    def __post_init__(self) -> None:
        least, most, iterations = _DEFAULTS[self.compat]
        if self.max_clusters is None:
            object.__setattr__(self, "max_clusters", max(most, self.min_clusters or 1))
        if self.min_clusters is None:
            object.__setattr__(self, "min_clusters", min(least, self.max_clusters))
        if self.max_iterations is None:
            object.__setattr__(self, "max_iterations", iterations)
        check_within("max_clusters", self.max_clusters, 1, 1024)
        check_within("min_clusters", self.min_clusters, 1, self.max_clusters)
        check_within("max_iterations", self.max_iterations, 1, 1000)
        check_within("seed", self.seed, 0, 2**63 - 1)
        check_within("min_gain", self.min_gain, 0.0, 1.0)
        check_within("outlier_share", self.outlier_share, 0.0, 1.0)
        check_within("time_share", self.time_share, 0.0, 1.0)
        if self.compat != "corrected" and self.selection_method == "gain":
            raise ConfigError("selection_method \"gain\": the published code has none; use compat 'corrected'")
        if self.compat != "corrected" and self.outlier_share:
            raise ConfigError("outlier_share: the published code has k-means only; use compat 'corrected'")
        if self.compat != "corrected" and self.time_share:
            raise ConfigError("time_share: the published code reads no times; use compat 'corrected'")
        if self.compat != "corrected" and self.code_type == "medoid":
            raise ConfigError("code_type: the published code has means only, no medoids; use compat 'corrected'")


def upgrade_vqtoken_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `VQTokenConfig` of format version 1 under their names of today.

    Version 1 had the same values for every `compat`, so a field that is left out keeps the default that it had then.
    """
    values: dict[str, Any] = {"min_clusters": 1, "max_clusters": 256, "max_iterations": 20}
    values |= {_VERSION_1.get(name, name): value for name, value in fields.items()}
    if isinstance(attention := values.get("attention"), Mapping):
        values["attention"] = {_ATTENTION_VERSION_1.get(name, name): value for name, value in attention.items()}
    return values
