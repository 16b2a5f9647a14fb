"""What a VQToken model is and how it reduces, as plain data.

Source: VQToken (arXiv 2503.16980). The published code keeps its method, K and mode in source edits (2025) or in fields
of the language model's configuration (2026); the names of the latter are given where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenthrift.config import ConfigError, check_within

__all__ = ["AttentionConfig", "VQTokenConfig"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """VQ-attention: what the codes learn from the token hash."""

    width: int
    """Width of the tokens."""
    heads: int = 8
    ffn: int = 2048
    """Width inside the feed-forward part; 2048 in the published model."""
    patches: int = 729
    """Tokens of a frame. Read by the published attention only, whose queries are rows of the index map."""

    def __post_init__(self) -> None:
        for name, high in (("width", 16_384), ("heads", 128), ("ffn", 65_536), ("patches", 65_536)):
            check_within(f"attention.{name}", getattr(self, name), 1, high)
        if self.width % self.heads:
            raise ConfigError(f"attention.width {self.width} must be a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class VQTokenConfig:
    """A whole model; the defaults need no weights."""

    compat: Literal["corrected", "released", "released_2025"] = "corrected"
    """"released" clusters, chooses K and attends as the published code of 2026, "released_2025" as that of 2025."""
    attention: AttentionConfig | None = None
    """None gives the codes as they are ("centroids" in the published configuration)."""
    codes: Literal["mean", "medoid"] = "mean"
    """Means that keep the scale of the tokens, or the real token most like each mean."""
    choose: Literal["fixed", "elbow", "silhouette"] = "fixed"
    """How many codes a clip gets: as many as the budget allows, or fewer by one of the published rules. A budget with a
    target error takes the fewest codes that reach it instead."""
    least: int = 1
    """Fewest codes that a rule may choose; 12 in the published model."""
    most: int = 256
    """Most codes that a rule or a target error may choose; 32 in the published model."""
    iterations: int = 20
    """Most passes of k-means over the tokens; 50 in the published model. Where a published rule chooses K, the fits of
    its search stop at 100, as published, whatever stands here."""
    seed: int = 0
    """Of the published k-means++, which in 2025 nothing seeded; the corrected clustering draws nothing."""

    def __post_init__(self) -> None:
        check_within("most", self.most, 1, 1024)
        check_within("least", self.least, 1, self.most)
        check_within("iterations", self.iterations, 1, 1000)
        check_within("seed", self.seed, 0, 2**63 - 1)
        if self.compat != "corrected" and self.codes == "medoid":
            raise ConfigError("codes: the published code knows means only, not medoids; use compat 'corrected'")
