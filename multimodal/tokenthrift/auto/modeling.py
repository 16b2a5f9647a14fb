"""The models as transformers models: `AutoModel.from_pretrained(folder)` and what goes with it.

`TokenthriftModel` is a `PreTrainedModel` around one of ours. `save_pretrained` and `push_to_hub` are those of
transformers; the files are those of our own loaders, name for name, so a folder written by either is read by both.

What differs from other models of transformers: weights are read by our own strict rules (see `tokenthrift.weights`),
since transformers only warns of tensors that are missing or unknown, and renames some that it takes for old ones. A
pickle is never opened. A model lies on one device as a whole.

Whatever a model can do besides is there under its own name: `model.transcribe(...)`, `model.encode(...)`,
`model.plan(...)`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tokenthrift.auto.configuration import CONFIGURATIONS, TokenthriftConfig
from tokenthrift.budget import DecodeBudget
from tokenthrift.hub import parse_device, parse_dtype
from tokenthrift.sources import INDEX, WEIGHTS, SourceError
from tokenthrift.weights import assign_weights, empty_parameters, unique_tensors

__all__ = ["MODELS", "KarlAuto", "SpeechAuto", "TokenthriftModel", "register"]

_LOUDEST: Final = 100.0  # a float recording may exceed 1 by far; speech as whole numbers exceeds this
MAX_NEW_TOKENS: Final = 256  # of a recording of at most 30 s
# What transformers passes on and what changes nothing here: there is no remote code, and all files are safetensors.
_WITHOUT_EFFECT: Final = {
    *("adapter_kwargs", "code_revision", "trust_remote_code", "low_cpu_mem_usage", "weights_only"),
    *("_commit_hash", "_from_auto", "_from_pipeline"),
}


class TokenthriftModel(PreTrainedModel):  # type: ignore[misc]
    """One of our models, for programs that know transformers models.

    Args:
        config: of the model's system.
        assets: what the model needs besides, a tokenizer say; read from where the configuration was, if not given.

    Attributes:
        model: the model itself.
    """

    config_class: ClassVar[type[TokenthriftConfig]]
    base_model_prefix = "model"
    model: Any

    def __init__(self, config: TokenthriftConfig, **assets: Any) -> None:
        super().__init__(config)
        kind = config.model_class()
        if not assets and kind.asset_files:
            if not config.name_or_path:
                raise ValueError(f"the model needs {', '.join(kind.asset_files)} besides; use from_pretrained")
            assets = kind.read_assets(_folder(config.name_or_path, kind.asset_files))
        self.model = kind(config.parsed(), **assets)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Our modules make their start values themselves."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: TokenthriftConfig | None = None,
        dtype: str | torch.dtype | None = "auto",
        device_map: Any = None,
        output_loading_info: bool = False,
        use_safetensors: bool | None = True,
        **options: Any,
    ) -> Self:
        """Loads a model, in evaluation mode.

        Args:
            source: a folder, or `owner/name` on the Hub.
            config: the configuration; that of the folder if not given.
            dtype: precision of the floating-point tensors; what `config.json` or else the file says, if "auto".
            device_map: one device, or "auto" for the accelerator that is there.
            output_loading_info: also give the dictionary that says that no tensor was missing or left over.
            use_safetensors: nothing else is read.
            options: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies`.

        Raises:
            TypeError: an option that this model does not have.
            OSError: there is no such model, or no safetensors.
            ConfigError: the configuration is not valid.
            WeightsError: tensors are missing, unknown or mis-shaped.
        """
        dtype = options.pop("torch_dtype", None) or dtype
        where: dict[str, Any] = {name: options.pop(name) for name in _WHERE if name in options}
        if unknown := sorted(set(options) - _WITHOUT_EFFECT):
            raise TypeError(f"{cls.__name__}.from_pretrained has no option {', '.join(unknown)}")
        if use_safetensors is False:
            raise TypeError(f"{cls.__name__} reads safetensors only")
        if config is None:
            config = cls.config_class.from_pretrained(source, **where)
        path, shards = _weight_files(source, where)
        kind = cls.config_class.model_class()
        names = kind.needed_files(config.parsed()) or kind.asset_files
        assets = kind.read_assets(_folder(source, names, **where)) if names else {}
        device = _one_device(device_map)
        with torch.random.fork_rng(devices=[]), empty_parameters():
            model = cls(config, **assets)
        if dtype is None or dtype == "auto":
            dtype = config.dtype or _file_dtype(shards or [path])
        precision = parse_dtype(dtype)
        assign_weights(model.model, path, device, precision, shards)
        model.model.load_external(**{name: where[name] for name in _EXTERNAL if where.get(name) is not None})
        model = model.to(device=device, dtype=precision).eval()
        model.config.dtype = precision
        if device_map is not None:
            model.hf_device_map = {"": device}
        info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, {**info, "error_msgs": []}) if output_loading_info else model  # type: ignore[return-value]

    def save_pretrained(self, folder: str | Path, *, state_dict: Any = None, **options: Any) -> None:
        """Writes the files that our own loaders read; in shards where `max_shard_size` says so.

        Args:
            folder: created if it does not exist.
            state_dict: tensors to write in place of the model's own, by its names.
            options: those of `PreTrainedModel.save_pretrained`.
        """
        own = unique_tensors(self.model)
        if state_dict is not None:
            given = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
            own = {name: given[name] for name in own}
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.model.write_assets(Path(folder))
        for name, fields in self.model.processor_files().items():
            (Path(folder) / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        super().save_pretrained(folder, state_dict=own, save_original_format=False, **options)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The forward pass of the model."""
        return self.model(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "model":
                raise
            return getattr(super().__getattr__("model"), name)


class SpeechAuto(TokenthriftModel):
    """A speech recognizer: `generate` gives token ids, as the pipeline of transformers wants them."""

    main_input_name = "input_values"

    def __init__(self, config: TokenthriftConfig, **assets: Any) -> None:
        super().__init__(config, **assets)
        # What is set here the pipeline does not set by its own defaults, which are made for Whisper.
        self.generation_config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, num_beams=1, pad_token_id=self._pad_id)
        self.model.plain = True  # the ids of `generate` are of tokens, which may have no capitals

    @classmethod
    def can_generate(cls) -> bool:
        """By `generate` below."""
        return True

    @torch.inference_mode()
    def generate(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        budget: Any = None,
        decode: Any = None,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
    ) -> Tensor:
        """Transcribes recordings.

        Args:
            input_values: `(B, samples)`, mono at 16 kHz.
            attention_mask: `(B, samples)`, 0 after the end of a recording.
            budget: of tokens, as in `transcribe`.
            decode: limits of decoding, as in `transcribe`.
            max_new_tokens: the one limit of `decode` that transformers has a name for.
            generation_config: the same limit, as some programs pass it.

        Returns:
            `(B, N)` token ids of the texts, the rest of each row filled up.

        Raises:
            ValueError: the samples are whole numbers of 16 bits, in whatever type.
        """
        if input_values.numel() and (peak := float(input_values.abs().max())) > _LOUDEST:
            raise ValueError(
                f"samples are numbers from -1 to 1, and one here is {peak:.0f}; divide those of 16 bits by 32768"
            )
        most = max_new_tokens or getattr(generation_config, "max_new_tokens", None)
        if most is not None:
            limits = DecodeBudget.parse(decode)
            decode = replace(limits, max_new_tokens=min(most, limits.max_new_tokens or most))
        lengths = [input_values.shape[1]] * len(input_values) if attention_mask is None else attention_mask.sum(1)
        audio = [row[: int(n)].float() for row, n in zip(input_values, lengths, strict=True)]
        texts = [transcript.text for transcript in self.model.transcribe(audio, budget=budget, decode=decode)]
        rows = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        longest = max(map(len, rows), default=0)
        filled = [row + [self._pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.long, device=input_values.device).reshape(len(rows), longest)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As `generate`. `transcribe` takes recordings of unequal lengths as a list and gives times and usage too."""
        return self.generate(input_values, attention_mask, **options)

    @property
    def _tokenizer(self) -> Any:
        """Of the tokenizers library."""
        return self.model.vocabulary.tokenizer if hasattr(self.model, "vocabulary") else self.model.tokenizer

    @property
    def _pad_id(self) -> int:
        return int(self.model.vocabulary.eos_id if hasattr(self.model, "vocabulary") else self.model.config.eos_id)


class KarlAuto(TokenthriftModel):
    """KARL in the manner of an autoencoder of diffusers: `encode`, `decode`, and both in `forward`."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, budget: Any = None) -> Tensor:
        """Images as their tokens show them, `(B, 3, H, W)` in [0, 1]."""
        tokens = self.model.encode(pixel_values, budget)
        height, width = pixel_values.shape[-2:]
        return self.model.decode(tokens, (height, width))  # type: ignore[no-any-return]


_WHERE: Final = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
_EXTERNAL: Final = ("cache_dir", "token", "local_files_only")
_BASES: Final = {"dllm_asr": SpeechAuto, "mtsk": SpeechAuto, "karl": KarlAuto}


def _class_of(system: str, config: type[TokenthriftConfig]) -> type[TokenthriftModel]:
    name = config.__name__.replace("AutoConfig", "AutoModel")
    return type(name, (_BASES.get(system, TokenthriftModel),), {"config_class": config, "__module__": __name__})


MODELS: Final = {system: _class_of(system, config) for system, config in CONFIGURATIONS.items()}
"""A class for each system."""

# Pickles and transformers find a class by its module.
globals().update({kind.__name__: kind for kind in MODELS.values()})


def register() -> None:
    """Makes `AutoModel` know the systems, and `AutoModelForSpeechSeq2Seq` (and so the pipeline) those of speech."""
    from transformers.models.auto import modeling_auto

    for system, kind in MODELS.items():
        modeling_auto.AutoModel.register(CONFIGURATIONS[system], kind, exist_ok=True)
        if issubclass(kind, SpeechAuto):
            modeling_auto.AutoModelForSpeechSeq2Seq.register(CONFIGURATIONS[system], kind, exist_ok=True)
            # The pipeline tells a model that generates from one of CTC by the name of its class.
            names = modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
            names[CONFIGURATIONS[system].model_type] = kind.__name__


def _folder(source: str | Path, names: tuple[str, ...], **where: Any) -> Path:
    """Where the named files of a model are on this machine, fetched as transformers fetches."""
    paths = [Path(str(cached_file(str(source), name, **where))) for name in names]
    return paths[0].parents[len(Path(names[0]).parts) - 1]


def _weight_files(source: str | Path, where: dict[str, Any]) -> tuple[Path, list[Path]]:
    """The one file, or the index and its shards."""
    quiet = {**where, "_raise_exceptions_for_missing_entries": False}
    for name in (WEIGHTS, INDEX):
        found = cached_file(str(source), name, **quiet)
        if found is not None and name == WEIGHTS:
            return Path(str(found)), []
        if found is not None:
            shards, _ = get_checkpoint_shard_files(str(source), str(found), **where)
            return Path(str(found)), [Path(shard) for shard in shards]
    raise SourceError(f"{source} has neither {WEIGHTS} nor {INDEX}; other formats are not read")


def _file_dtype(paths: list[Path]) -> torch.dtype:
    """The precision of the first floating-point tensor."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is not a mapping)
                tensor: Tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    return tensor.dtype
    return torch.float32


def _one_device(device_map: Any) -> torch.device:
    if device_map in ("auto", "balanced", "sequential"):
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return parse_device("cpu", device_map)
