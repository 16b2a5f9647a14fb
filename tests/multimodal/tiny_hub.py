"""A model to save, load and share that has what real ones have."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenthrift.hub import ConfigError, HubModel


@dataclass(frozen=True)
class TinyConfig:
    width: int = 4
    words: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 64:
            raise ConfigError(f"width must be within 1 and 64, not {self.width}")


class Tiny(HubModel):
    """Tied weights, an integer buffer, a buffer that is not saved, and an asset: what real models have."""

    system = "tiny"
    config_class = TinyConfig
    asset_files: ClassVar[tuple[str, ...]] = ("words/list.txt",)
    config: TinyConfig
    steps: Tensor
    scale: Tensor

    def __init__(self, config: TinyConfig, words: tuple[str, ...] = ()) -> None:
        super().__init__(config)
        self.words = words
        self.embedding = nn.Embedding(config.words, config.width)
        self.head = nn.Linear(config.width, config.words)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        return {"words": tuple((folder / "words/list.txt").read_text().split())}

    def write_assets(self, folder: Path) -> None:
        (folder / "words").mkdir()
        (folder / "words/list.txt").write_text("\n".join(self.words))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.head(self.embedding(ids))  # type: ignore[no-any-return]


WORDS = ("one", "two")

IDS = torch.tensor([[0, 3, 5]])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
