"""How the work of a job is done: here, or on a Ray cluster; both give results the moment they are done.

`JobSpec` is plain data, so that a worker on another machine builds the same recognizer and the same `Transcriber`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from tokenthrift import extras
from tokenthrift.budget import DecodeBudget, TokenBudget
from tokenthrift.config import read_json
from tokenthrift.devices import working_device
from tokenthrift.sources import fetch
from tokenthrift.transcription.models import load_recognizer, of_ctranslate2, recognizer_class
from tokenthrift.transcription.vad_weights import weights_digest

if TYPE_CHECKING:
    from tokenthrift.transcription.job import Transcriber

__all__ = ["JobSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """Everything that decides what a job writes, and where it runs."""

    model: str
    revision: str | None = None
    language: str | None = None
    task: str = "transcribe"
    precision: str | None = None
    align: str | None = None
    draft_model: str | None = None
    budget: str | None = None
    max_new_tokens: int | None = None
    max_rounds: int | None = None
    confidence_threshold: float | None = None
    plain: bool = False
    certify: Literal["ar"] | None = None
    hotwords: Sequence[str] = ()
    coarse_to_fine: bool = False
    noise_aware: bool = False
    track: int | str | None = None
    channels: Any = "mix"
    drop_below: float = 0.0
    flag_below: float | None = None
    batch_seconds: float = 120.0
    device: str | None = None
    threads: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What a result depends on besides the input and the model; nothing of batches and machines.

        What finds speech is among it, because it decides the windows.
        """
        machine = {"model", "revision", "batch_seconds", "device", "threads"}
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in machine}
        return chosen | {"vad": weights_digest()}

    @property
    def decode(self) -> DecodeBudget:
        """Limits of decoding.

        Raises:
            BudgetError: they are none.
        """
        return DecodeBudget(
            max_new_tokens=self.max_new_tokens,
            max_rounds=self.max_rounds,
            confidence_threshold=self.confidence_threshold,
            certify=self.certify,
            hotwords=tuple(self.hotwords),
        )

    def check_draft_model(self) -> None:
        """Looks at the configurations alone, so that nothing wrong with them is found only by the workers of a cluster.

        Raises:
            ValueError, OSError: the model takes no draft, or `draft_model` can be none.
        """
        if self.draft_model is None:
            return
        if not hasattr(recognizer_class(self.model, self.revision), "draft_model"):
            raise ValueError(f"--draft-model is for dLLM-ASR; {self.model} takes no draft")
        if not getattr(recognizer_class(self.draft_model), "gives_times", False):
            raise ValueError(
                f"--draft-model {self.draft_model} gives no times of its words, which a draft needs; a CTC model does"
            )

    def transcriber(self) -> Transcriber:
        """Loads the model.

        Raises:
            ValueError, OSError, ImportError: it cannot be used.
        """
        from tokenthrift.transcription.job import Transcriber

        self.check_draft_model()
        device = self._device()
        aligner = None
        if self.align is not None:
            from tokenthrift.transcription.alignment import load_aligner

            aligner = load_aligner(self.align, device)
        recognizer = load_recognizer(
            self.model,
            device,
            self.revision,
            language=self.language,
            task=self.task,
            precision=self.precision,
            threads=self.threads,
        )
        written_by: Any = getattr(recognizer, "inner", recognizer)
        if self.draft_model is not None:
            written_by.draft_model = _drafting(self.draft_model, load_recognizer(self.draft_model, device), recognizer)
        if self.plain and hasattr(written_by, "plain"):
            written_by.plain = True
        return Transcriber(
            recognizer,
            budget=TokenBudget.parse(self.budget),
            decode=self.decode,
            coarse_to_fine=self.coarse_to_fine,
            noise_aware=self.noise_aware,
            batch_seconds=self.batch_seconds,
            track=self.track,
            channels=self.channels,
            drop_below=self.drop_below,
            aligner=aligner,
        )

    def _device(self) -> str:
        """Where the model goes; PyTorch is asked, and given its threads, unless nothing needs it."""
        folder = fetch(self.model, ("config.json",), revision=self.revision)
        if self.align is None and of_ctranslate2(read_json(folder / "config.json")):
            if self.device is not None:
                return self.device
            return "cuda" if extras.require("ctranslate2").get_cuda_device_count() else "cpu"
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return working_device(self.device)


def _drafting(name: str, model: Any, of: Any) -> Any:
    """The model, if its words can be the draft of another one.

    Raises:
        ValueError: it reads another rate.
    """
    if model.sample_rate != of.sample_rate:
        raise ValueError(f"--draft-model {name} reads {model.sample_rate} Hz, and a draft is of {of.sample_rate} Hz")
    return model
