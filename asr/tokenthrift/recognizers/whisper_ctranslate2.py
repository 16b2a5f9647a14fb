"""Whisper by CTranslate2: the folders of faster-whisper (`model.bin`, `config.json`, `tokenizer.json`).

Source: Radford et al. 2022 (arXiv 2212.04356); the network runs in CTranslate2's C++, in float32 or with int8 weights.
Nothing here needs PyTorch, and the batch job starts without it. What differs from faster-whisper: windows of many files
share a batch on an accelerator; on a processor the encoder reads 20 s of silence after a recording instead of silence
up to 30 s, which costs a quarter less for short ones (docs/transcription.md). It runs once for a text, its word times
and its language; no timestamps are decoded, every token has its probability, and nothing is sampled at a higher
temperature. The folder is data: the headers of `model.bin` are checked first, and no other file of it is executed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift import extras
from tokenthrift.budget import DecodeBudget
from tokenthrift.config import ConfigError, load_json, read_json
from tokenthrift.recognizers.base import Parts, usage_of
from tokenthrift.recognizers.ctranslate2_file import ModelFile, read_model_file
from tokenthrift.recognizers.whisper_base import WhisperBase
from tokenthrift.recognizers.whisper_mel import padded_log_mel
from tokenthrift.recognizers.whisper_vocabulary import WhisperVocabulary, is_silence
from tokenthrift.sources import SourceError, WeightsError, fetch
from tokenthrift.transcript import Transcript
from tokenthrift.whisper_frames import MAX_STATES, states_of

if TYPE_CHECKING:
    import torch

__all__ = ["CTranslate2Recognizer", "load_ctranslate2"]

TRAILING_SILENCE: Final = 20.0
"""Seconds of silence that the encoder reads after a recording."""
_STATE_SECONDS: Final = 0.02
_VOCABULARIES: Final = ("vocabulary.json", "vocabulary.txt")


class CTranslate2Recognizer(WhisperBase):
    """A `Recognizer` of a Whisper in CTranslate2.

    Args:
        parts: a `ctranslate2.models.Whisper`, nothing, and a tokenizer.
        file: what its `model.bin` holds.
        language: as of `WhisperRecognizer`.
        task: likewise.
        trailing_silence: most seconds of silence that the encoder reads after a recording on a processor. Whisper was
            trained on 30 s always, and misreads the end of speech with little silence after it.
    """

    takes_arrays = True

    def __init__(
        self,
        parts: Parts,
        file: ModelFile,
        *,
        language: str | None = None,
        task: str = "transcribe",
        trailing_silence: float = TRAILING_SILENCE,
    ) -> None:
        self._positions, self._bins = file.shapes["decoder/position_encodings/encodings"][0], parts.model.n_mels
        vocabulary = WhisperVocabulary(parts.tokenizer.special, file.shapes["decoder/embeddings/weight"][0])
        super().__init__(parts, vocabulary, language=language, task=task)
        if not 0 <= trailing_silence <= 30:
            raise ValueError(f"trailing_silence must be 0 to 30 seconds, not {trailing_silence}")
        self._silence = math.ceil(trailing_silence / _STATE_SECONDS)
        # -1 stands for the symbols that the folder's config.json names.
        self._never = [-1, *vocabulary.never(vocabulary.special["<|endoftext|>"])]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        import torch

        return torch.device(self.model.device)

    def native_tokens(self, samples: int) -> int:
        """States that the encoder reads; 30 s on an accelerator, so that any rows share a batch."""
        if self.model.device != "cpu":
            return MAX_STATES
        return min(states_of(samples) + self._silence, MAX_STATES)

    def prepare(self, samples: Any) -> NDArray[np.float32]:
        """An array of whatever holds samples; a tensor is moved to the processor."""
        return np.asarray(samples.detach().cpu() if hasattr(samples, "detach") else samples, dtype=np.float32)

    def computing(self) -> nullcontext[None]:
        """Nothing."""
        return nullcontext()

    def transcribe_rows(self, audio: Sequence[NDArray[np.float32]], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of any lengths; on a processor one by one, where a batch takes longer."""
        if self.model.device == "cpu" and len(audio) > 1:
            return [self.transcribe_rows([samples], limits)[0] for samples in audio]
        storage: Any = extras.require("ctranslate2").StorageView
        mels = np.stack([padded_log_mel(s, self._bins, self.native_tokens(len(s))) for s in audio])
        finds = self._vocabulary.multilingual and self.language is None
        states = self.model.encode(storage.from_array(mels), to_cpu=finds)
        prompts = self._prompts(states, len(audio))
        most = [self._most(len(samples), len(prompts[0]), self._positions, limits) for samples in audio]
        found = self.model.generate(
            states,
            prompts,
            beam_size=1,
            # CTranslate2 writes at most half of this, and no more than it leaves after the prompt.
            max_length=max(most) + max(*most, len(prompts[0])),
            suppress_tokens=self._never,
            return_no_speech_prob=self._vocabulary.silence is not None,
        )
        texts = [list(row.sequences_ids[0])[:count] for row, count in zip(found, most, strict=True)]
        frames = [2 * states_of(len(samples)) for samples in audio]
        aligned = self._aligned(states, prompts, texts, frames)
        return [
            Transcript("", (), usage_of(self.native_tokens(len(samples)), len(ids) + 1))
            if is_silence(confidences, row.no_speech_prob)
            else self._timed(ids, confidences, times, len(samples))
            for ids, (confidences, times), row, samples in zip(texts, aligned, found, audio, strict=True)
        ]

    def _prompts(self, states: Any, rows: int) -> list[list[int]]:
        ids = self._vocabulary.prompt(0, self.language, self.task)
        if None not in ids:
            return [[i for i in ids if i is not None]] * rows
        languages = [self._vocabulary.special[found[0][0]] for found in self.model.detect_language(states)]
        return [[language if i is None else i for i in ids] for language in languages]

    def _aligned(
        self, states: Any, prompts: list[list[int]], texts: list[list[int]], frames: list[int]
    ) -> list[tuple[list[float], list[tuple[float, float]]]]:
        """Probability of each token, and its start and end in seconds."""
        found: list[tuple[list[float], list[tuple[float, float]]]] = [([], []) for _ in texts]
        for prompt in {tuple(prompt) for prompt in prompts}:
            rows = [i for i, ids in enumerate(texts) if ids and tuple(prompts[i]) == prompt]
            if not rows:
                continue
            own = states
            if len(rows) < len(texts):
                cpu = states.to_device(extras.require("ctranslate2").Device.cpu)
                own = type(states).from_array(np.ascontiguousarray(np.asarray(cpu)[rows]))
            aligned = self.model.align(own, list(prompt), [texts[i] for i in rows], [frames[i] for i in rows])
            for i, row in zip(rows, aligned, strict=True):
                probabilities = [float(p) for p in row.text_token_probs]
                found[i] = probabilities, _times(row.alignments, len(texts[i]), frames[i])
        return found


def _times(path: Sequence[tuple[int, int]], count: int, frames: int) -> list[tuple[float, float]]:
    """Start and end of each of `count` tokens from a path of tokens and encoder states."""
    starts: dict[int, float] = {}
    for token, state in path:
        starts.setdefault(int(token), int(state) * _STATE_SECONDS)
    last = frames * _STATE_SECONDS / 2
    edges = [starts.get(token, last) for token in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


class _Tokenizer:
    """Ids to text, without transformers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._inner = Tokenizer.from_file(str(path))
        except Exception as error:  # The Rust reader raises a plain Exception for whatever is wrong.
            raise ConfigError(f"{path}: no tokenizer: {error}") from error
        self.special = {token.content: index for index, token in self._inner.get_added_tokens_decoder().items()}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)


def load_ctranslate2(
    source: str | Path,
    *,
    device: str = "cpu",
    revision: str | None = None,
    language: str | None = None,
    task: str = "transcribe",
    precision: str | None = None,
    threads: int | None = None,
    trailing_silence: float = TRAILING_SILENCE,
) -> CTranslate2Recognizer:
    """Loads a Whisper that was converted to CTranslate2.

    Args:
        source: a folder, or `owner/name` on the Hugging Face Hub.
        device: "cpu", "cuda" or "cuda:1".
        revision: branch, tag or commit on the Hub.
        language: of the speech, where the model takes it; an ISO code or an English name.
        task: "transcribe", or "translate" into English.
        precision: "int8" or "float32"; None for that of the file.
        threads: of a processor; None for PyTorch's number where that runs as well, else CTranslate2's own.
        trailing_silence: as of `CTranslate2Recognizer`.

    Raises:
        SourceError: the source leads nowhere.
        ConfigError: config.json, tokenizer.json and the vocabulary are not those of a Whisper.
        WeightsError: model.bin is damaged or no Whisper.
        ValueError: the model takes no language or does not translate, or the silence is below 0 or above 30 s.
        MissingExtraError: ctranslate2 is not installed.
    """
    folder = fetch(source, ("config.json", "model.bin", "tokenizer.json"), revision=revision)
    _fetch_vocabulary(source, revision)
    file = read_model_file(folder / "model.bin")
    needed = ("decoder/embeddings/weight", "decoder/position_encodings/encodings", "encoder/conv1/weight")
    if file.network != "WhisperSpec" or not all(file.shapes.get(name) for name in needed):
        raise WeightsError(f"{source}: model.bin holds a {file.network}; of CTranslate2's networks Whisper is read")
    _check_folder(folder, file)
    tokenizer = _Tokenizer(folder / "tokenizer.json")
    if "<|endoftext|>" not in tokenizer.special or "<|startoftranscript|>" not in tokenizer.special:
        raise ConfigError(f"{source}: tokenizer.json has no tokens for the start and the end of a text")
    kind, _, index = device.partition(":")
    if threads is None:
        threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    try:
        model = extras.require("ctranslate2").models.Whisper(
            str(folder),
            device=kind,
            device_index=int(index or 0),
            compute_type=precision or "default",
            intra_threads=threads,
        )
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{source}: CTranslate2 cannot load it: {error}") from error
    parts = Parts(model, None, tokenizer)
    return CTranslate2Recognizer(parts, file, language=language, task=task, trailing_silence=trailing_silence)


def _fetch_vocabulary(source: str | Path, revision: str | None) -> None:
    for name in _VOCABULARIES:
        try:
            fetch(source, (name,), revision=revision)
        except (SourceError, WeightsError):  # To `fetch`, model.bin without a safetensors file is a pickle.
            continue
        return
    raise ConfigError(f"{source} has no {' or '.join(_VOCABULARIES)}")


def _check_folder(folder: Path, file: ModelFile) -> None:
    """Raises ConfigError for ids and heads that the network does not have: CTranslate2 takes them as they are."""
    size = file.shapes["decoder/embeddings/weight"][0]
    path = folder / _VOCABULARIES[0]
    if path.is_file():
        words = load_json(path)
        count = len(words) if isinstance(words, list) else -1
    else:
        path = folder / _VOCABULARIES[1]
        count = path.read_bytes().count(b"\n")
    if count != size:
        raise ConfigError(f"{path}: {count} tokens, and the network has {size}")
    fields = read_json(folder / "config.json")
    for name in ("suppress_ids", "suppress_ids_begin", "lang_ids"):
        ids = fields.get(name) or []  # null where the checkpoint names none
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise ConfigError(f"{folder / 'config.json'}: {name} must be ids below {size}")
    layers = len({name.split("/")[1] for name in file.shapes if name.startswith("decoder/layer_")})
    heads = fields.get("alignment_heads") or []
    most = (layers, file.numbers.get("decoder/num_heads", 1))
    if not isinstance(heads, list) or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(i) is int and 0 <= i < limit for i, limit in zip(pair, most, strict=True))
        for pair in heads
    ):
        raise ConfigError(
            f"{folder / 'config.json'}: alignment_heads must be a layer below {most[0]} and a head below {most[1]}"
        )
