"""A folder or Hub repository of transformers to the adapter of its kind; nothing of it is ever executed.

The class comes from transformers' own tables by the word `model_type` in `config.json`. Refused before anything is
allocated: pickled weights, code of the repository (`auto_map` without a class in transformers), sizes that no speech
model has, and weights that leave part of the model at random (transformers only logs that).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Final

from tokenthrift.config import ConfigError, read_json
from tokenthrift.recognizers.base import Parts, TransformersRecognizer
from tokenthrift.sources import INDEX, PICKLES, WEIGHTS, SourceError, WeightsError, fetch, fetch_weights, is_folder
from tokenthrift.weights import read_headers

__all__ = ["adapter_class", "load_transformers"]

_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_MOST_LAYERS: Final = 256
_MOST: Final = 10_000_000  # no width, vocabulary or position count comes near
# Of what turns sound into numbers, which allocates filters by them, or pads every recording to so many seconds.
_MOST_OF: Final = {
    "feature_size": 1024,
    "num_mel_bins": 1024,
    "n_fft": 65_536,
    "win_length": 65_536,
    "chunk_length": 600,
    "sampling_rate": 200_000,
}
_SETTINGS: Final = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
_EXTRA_NUMBERS: Final = 1_000_000
# Used in training only, and absent from most published checkpoints.
_TRAINING_ONLY: Final = ("masked_spec_embed",)
_NOT_SPEECH_TO_TEXT: Final = frozenset({"dia", "pop2piano", "vibevoice"})


def load_transformers(
    source: str | Path,
    *,
    device: str = "cpu",
    revision: str | None = None,
    language: str | None = None,
    task: str = "transcribe",
) -> TransformersRecognizer:
    """Loads any speech model of transformers whose weights are safetensors.

    Args:
        source: a folder, or `owner/name` on the Hugging Face Hub.
        device: where the model goes.
        revision: branch, tag or commit on the Hub.
        language: of the speech, where the model takes it; an ISO code or an English name.
        task: "transcribe", or "translate" into English.

    Raises:
        SourceError: the source leads nowhere.
        ConfigError: it is no speech model that transformers knows without code of the repository.
        WeightsError: there are no safetensors, or they are not those of the model.
        ValueError: the model takes no language or does not translate.
    """
    folder = _folder(source, revision)
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    for path in (folder / name for name in _SETTINGS):
        if path.is_file():
            _check_sizes(read_json(path), str(path))
    automatic, adapter, whole_processor = _kind(kind, str(source))
    expected, numbers = _check_weights(folder, source)
    import torch
    from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with _loading(source):
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in automatic.from_config(config).parameters())
    if needed > 2 * numbers + _EXTRA_NUMBERS:
        # Transformers would allocate what is missing and draw it at random.
        raise WeightsError(f"{source}: config.json is of {needed:,} numbers, and its {expected} of {numbers:,}")
    with _loading(source):
        model, report = automatic.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, dtype="auto", **options
        )
        if whole_processor:
            features = AutoProcessor.from_pretrained(folder, **options)
            tokenizer = features.tokenizer
        else:
            features = AutoFeatureExtractor.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    missing = [key for key in report["missing_keys"] if not key.endswith(_TRAINING_ONLY)]
    wrong = [*missing, *(str(key) for key in report.get("mismatched_keys") or ())]
    if wrong:
        names = ", ".join(wrong[:10])
        raise WeightsError(f"{source}: {len(wrong)} of the model's tensors are not in its {expected} ({names})")
    # Half precision is for accelerators; on a processor it is slower and less exact.
    model = model.to(device).eval() if not device.startswith("cpu") else model.float().to(device).eval()
    recognizer: TransformersRecognizer = adapter(Parts(model, features, tokenizer), language=language, task=task)
    return recognizer


def adapter_class(model_type: object, source: str) -> type[TransformersRecognizer]:
    """The class of the recognizer that `load_transformers` would give.

    Args:
        model_type: of config.json.
        source: what errors name.

    Raises:
        ConfigError: it is no speech model that transformers knows without code of the repository.
    """
    return _kind(model_type, source)[1]


def _folder(source: str | Path, revision: str | None) -> Path:
    folder = fetch(source, ("config.json",), revision=revision)
    if is_folder(source):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=folder.name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise SourceError(f"{source}: the Hub did not give its files: {error}") from error


def _kind(model_type: object, source: str) -> tuple[Any, type[TransformersRecognizer], bool]:
    """Transformers' own loader, our adapter, and whether it needs the processor as a whole."""
    import transformers
    from transformers.models.auto import modeling_auto as tables

    from tokenthrift.recognizers.audio_lm import AudioLmRecognizer
    from tokenthrift.recognizers.ctc import CtcRecognizer
    from tokenthrift.recognizers.seq2seq import Seq2SeqRecognizer
    from tokenthrift.recognizers.transducer import TransducerRecognizer
    from tokenthrift.recognizers.whisper import WhisperRecognizer

    if not isinstance(model_type, str) or model_type in _NOT_SPEECH_TO_TEXT:
        raise ConfigError(f"{source}: model_type is {model_type!r}, which is no speech recognizer of transformers")
    if model_type == "whisper":
        return transformers.AutoModelForSpeechSeq2Seq, WhisperRecognizer, False
    languages = getattr(tables, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    images = getattr(tables, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {})
    choices: list[tuple[str, str, type[TransformersRecognizer], bool]] = [
        ("MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC", CtcRecognizer, False),
        ("MODEL_FOR_TDT_MAPPING_NAMES", "AutoModelForTDT", TransducerRecognizer, False),
        ("MODEL_FOR_RNNT_MAPPING_NAMES", "AutoModelForRNNT", TransducerRecognizer, False),
    ]
    if model_type in languages and model_type not in images:
        choices.append(("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM", AudioLmRecognizer, True))
    choices.append(("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq", Seq2SeqRecognizer, False))
    for table, loader, adapter, whole in choices:
        if model_type in getattr(tables, table, {}) and hasattr(transformers, loader):
            # A request for transcription, as Canary's processor makes, is an adapter's business whatever the network.
            return getattr(transformers, loader), adapter, whole
    raise ConfigError(
        f"{source}: model_type is {model_type!r}, which is no speech recognizer that transformers "
        f"{transformers.__version__} knows without code of the repository"
    )


def _check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for numbers that would allocate, or loop, without end."""
    waiting: list[tuple[str, Any]] = list(fields.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = _MOST_LAYERS if "layers" in name else _MOST_OF.get(name, _MOST)
            if abs(value) > most:
                raise ConfigError(f"{where}: {name} is {value}; at most {most} is read")


def _check_weights(folder: Path, source: str | Path) -> tuple[str, int]:
    """The name of the weights and how many numbers they are, once their headers are known to be whole."""
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        what = f"only {pickles[0]}, and opening a pickle can run code" if pickles else "no model.safetensors"
        raise WeightsError(f"{source} has {what}; this job loads safetensors alone")
    files = fetch_weights(folder)
    numbers = sum(prod(shape) for shape, _ in read_headers(files).values())
    return WEIGHTS if len(files) == 1 else f"{len(files)} safetensors files", numbers


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """No progress bars and warnings of transformers about what is checked here anyway, and one kind of error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{source}: transformers cannot load it: {_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
