"""Llama-MTSK: speech, lips or both to text at any trained rate, within a budget of tokens.

Source: Llama-MTSK (arXiv 2503.06362), section 3. Speech and lips are encoded once; at each call a pair of rates says
how many states make a token, and picks the projectors and adapters that belong to it. What differs: each item has the
rates that its budget affords, where the published code fixes one pair for a whole run; see `network` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.auto.processing import speech_files
from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeLike, NativeCost, SizeLike, TokenUsage
from tokenthrift.lazy import deprecated
from tokenthrift.mtsk.config import MtskConfig, upgraded
from tokenthrift.mtsk.external import PARTS, external_sources, load_external
from tokenthrift.mtsk.network import MtskNetwork
from tokenthrift.mtsk.planning import FRAMES_PER_SECOND, SAMPLE_RATE, ItemPlan, native_cost, plan_items
from tokenthrift.mtsk.rates import SUPPORT, Rates
from tokenthrift.mtsk.transcribing import recordings_of, transcribe_recordings
from tokenthrift.transcript import Transcript

__all__ = ["LlamaMtsk"]


class LlamaMtsk(MtskNetwork):
    """Speech, lips or both to text, within a budget of tokens that the caller sets.

    Args:
        config: sizes, rates, strategy.
        tokenizer: of the language model, in the format of the tokenizers library.
        base_dir: the model's folder, against which relative names of external parts are read first.
    """

    system: ClassVar[str] = "mtsk"
    config_class: ClassVar[type] = MtskConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    support: ClassVar[BudgetSupport] = SUPPORT
    sample_rate = SAMPLE_RATE
    frame_rate = FRAMES_PER_SECOND
    max_seconds = 30.0

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """See `HubModel.upgrade_config`."""
        return upgraded(fields, version)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The tokenizer, and the model's folder."""
        return {"tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")), "base_dir": folder}

    def write_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """For the speech pipeline of transformers."""
        return speech_files(SAMPLE_RATE, self.tokenizer.id_to_token(self.config.eos_id))

    def load_external(self, **options: Any) -> None:
        """Fills the parts that the configuration names by folder or Hub id; see `external.load_external`."""
        modules = {part: getattr(self, part) for part in PARTS.values()}
        load_external(modules, external_sources(self.config), self.base_dir, **options)

    @property
    def native_cost(self) -> NativeCost:
        """Encoder states for a second of sound and for a frame of video."""
        return native_cost(self.config)

    def plan(
        self,
        items: Sequence[SizeLike],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        *,
        rates: Rates | None = None,
        coarse_to_fine: bool = False,
    ) -> tuple[TokenUsage, ...]:
        """What items will use, known before anything is computed; see `TokenPlanner.plan`.

        Args:
            items: seconds of sound, frames of video at 25 a second, or both.
            budget: as in `transcribe`.
            rates: as in `transcribe`.
            coarse_to_fine: count both passes, a bound for what is used.

        Raises:
            BudgetError, ValueError: as `transcribe`.
        """
        plans = self.plan_rates(items, budget, rates=rates, coarse_to_fine=coarse_to_fine)
        return tuple(plan.last.usage for plan in plans)

    def plan_rates(
        self,
        items: Sequence[SizeLike],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        *,
        rates: Rates | None = None,
        coarse_to_fine: bool = False,
    ) -> list[ItemPlan]:
        """As `plan`, with the rates that each item gets."""
        return plan_items(self.config, items, budget, rates=rates, coarse_to_fine=coarse_to_fine)

    def transcribe(
        self,
        audio: Sequence[Tensor | None] | None = None,
        video: Sequence[Tensor | None] | None = None,
        budget: BudgetLike | Sequence[BudgetLike] = None,
        *,
        rates: Rates | None = None,
        decode: DecodeLike = None,
        beams: int | None = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
    ) -> list[Transcript]:
        """Transcribes recordings; the result of each is that of the recording alone.

        A phrase that follows itself faster than anybody speaks is written once, unless `compat` is "released".

        Args:
            audio: (samples,) each, mono at 16 kHz in [-1, 1], at most 30 s; None where there is none.
            video: (T, H, W) each, gray mouth crops at 25 frames a second, uint8 or in [0, 1], or (T, D) states of a
                visual encoder; None where there is none.
            budget: ceilings in tokens for each item, or a list with one budget for each; without, the rates with the
                fewest errors. Tokens are those of audio and video; markers and prompt add about a dozen.
            rates: take these rates instead of choosing; the budget holds all the same.
            decode: ceilings for each text. `max_rounds` and `confidence_threshold` are about `coarse_to_fine`.
            beams: width of the search, 1 for greedy; that of `config.decoding` if not given.
            coarse_to_fine: decode at the cheapest rates first, and at those of the budget only what is not confident.
                The budget then holds for both passes together.
            noise_aware: choose by the lines of the model's table that fit the noise of the item's audio.

        Raises:
            BudgetError: a budget that cannot be honored, with the nearest that can.
            ValueError: an item that the encoders cannot read, or streams that the model was not trained for.
        """
        return transcribe_recordings(
            self,
            recordings_of(audio, video),
            budget,
            rates=rates,
            decode=decode,
            beams=beams,
            coarse_to_fine=coarse_to_fine,
            noise_aware=noise_aware,
        )

    def accepts(self, *, audio: bool, video: bool) -> bool:
        """Whether the model has rates for items with these streams, or for some of them."""
        return any(rates.fits(audio=audio, video=video) for rates in self.config.scales)

    def read_lips(self, path: Path) -> Tensor | None:
        """The mouth crops in a file, or None where the model reads no crops or the file has no whole video.

        Raises:
            FaceError: there are pictures, and no face in them.
        """
        if self.video_encoder is None:
            return None
        from tokenthrift.media.video import VideoError
        from tokenthrift.mtsk.audiovisual.lips import read_lips

        try:
            return read_lips(path).pixels
        except VideoError:
            return None


__getattr__ = deprecated(__name__, {"LlamaMTSK": "LlamaMtsk"})
