"""The authors' checkpoints and ours to a model folder: `tokenthrift convert mtsk FILE... OUT`.

Source: state dicts of Llama-AVSR, Llama-MTSK and Omni-AVSR, whose names are

    {audio,video}_proj[.k].{0,2,3}                                    k the index in the list of rates
    llm.model.layers.l.self_attn.lora_{down,up}_{Q,V}                 one adapter (MS)
    ... .lora_{down,up}_{Q,V}.{audio,video,audiovisual}, ..._shared   Omni-AVSR: one per task, one for all
    ... .local_loras.k.lora_..., ... .global_lora.lora_...            one per scale (SS), and one for all (MSS)
    audio_encoder.*, video_encoder.*, llm.*                           Whisper, AV-HuBERT, the language model

An adapter per task is one per scale, the same for all scales of the task, so Omni-AVSR's strategies need no code of
their own. Such a file says neither the heads of the language model nor the rates; give its `config.json` and
`tokenizer.json` along, and the rates in a JSON file (`{"audio_rates": [4, 16], "video_rates": [2, 5]}`, any field of
the configuration) unless the checkpoint's name has them. The result computes what the authors' code computes.

Checkpoints are read by a restricted unpickler that runs nothing from the file; fairseq, whose classes AV-HuBERT's files
name, is not needed. `tokenthrift convert avhubert large_vox_iter5.pt OUT` makes the folder that `video.source` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig

from tokenthrift.config import from_plain, to_plain
from tokenthrift.hub import HubModel
from tokenthrift.lazy import deprecated
from tokenthrift.mtsk.audiovisual.avhubert import avhubert_config, avhubert_weights
from tokenthrift.mtsk.config import AudioConfig, MtskConfig, Strategy, VideoConfig
from tokenthrift.mtsk.external import AVHUBERT_FILE
from tokenthrift.mtsk.language_model import describe
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.sources import WeightsError
from tokenthrift.untrusted import read_checkpoint, tensors_in

__all__ = ["AvHubertFolder", "avhubert", "mtsk", "published_config", "published_weights"]

INERT: Final = ("fairseq.", "omegaconf.", "argparse.Namespace", "pathlib.", "typing.Any", "collections.", "numpy.")
_ADAPTER = re.compile(
    r"(?P<owner>llm\.model|video_encoder\.encoder)\.layers\.(?P<layer>\d+)\.self_attn\."
    r"(?:local_loras\.(?P<local>\d+)\.|(?P<whole>global_lora)\.)?"
    r"lora_(?P<way>down|up)_(?P<name>Q|V)(?P<shared>_shared)?(?:\.(?P<task>audio|video|audiovisual))?\.weight"
)
_TASKS: Final = {"audio": "asr", "video": "vsr", "audiovisual": "avsr"}


@dataclass(frozen=True, slots=True, eq=False)
class AvHubertFolder:
    """The weights of a visual encoder, ready for the folder that `video.source` names."""

    sizes: VideoConfig
    weights: Mapping[str, Tensor]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `avhubert.safetensors`.

        Args:
            folder: made if it does not exist.
            dtype: precision of its numbers; as they are if not given.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.weights.items()}
        save_file({k: v.contiguous() for k, v in kept.items()}, folder / AVHUBERT_FILE)


def avhubert(checkpoints: Sequence[Path]) -> AvHubertFolder:
    """The visual encoder in a public AV-HuBERT checkpoint, pretrained or fine-tuned.

    Raises:
        WeightsError: another file, or more than one.
    """
    if len(checkpoints) != 1:
        raise WeightsError(f"give one AV-HuBERT checkpoint, not {len(checkpoints)}")
    found = _read(checkpoints[0])
    state = avhubert_weights(tensors_in(found.get("model", found), checkpoints[0]))
    if "post_extract_proj.weight" not in state:
        raise WeightsError(f"{checkpoints[0]} is no AV-HuBERT checkpoint: it has no post_extract_proj.weight")
    return AvHubertFolder(avhubert_config(state), state)


def mtsk(checkpoints: Sequence[Path]) -> HubModel:
    """The model in a published checkpoint, or in one of our own trainings.

    Args:
        checkpoints: the checkpoint (`.pth`, `.pt`, `.bin`, `.ckpt` or `.safetensors`) and, for a published one,
            `config.json` and `tokenizer.json` of its language model, `config.json` of its Whisper unless that has the
            usual heads of 64, and a JSON file of further fields.

    Raises:
        WeightsError: a file is missing, is not what it should be, or holds tensors that do not fit.
    """
    states = [path for path in checkpoints if path.suffix != ".json"]
    if len(states) != 1:
        raise WeightsError(f"give one checkpoint, not {len(states)}; what goes with it are JSON files")
    found = _read(states[0])
    if any(str(key).startswith("model.lora.layers.") for key in found.get("state_dict", ())):
        return _our_own(found)
    state = {
        key.removeprefix("model."): value
        for key, value in tensors_in(found.get("state_dict", found), states[0]).items()
    }
    plain = [json.loads(path.read_text(encoding="utf-8")) for path in checkpoints if path.suffix == ".json"]
    by_kind = {_kind(data): data for data in plain}
    tokenizers = [path for path in checkpoints if path.name.startswith("tokenizer") and path.suffix == ".json"]
    if "language_model" not in by_kind or len(tokenizers) != 1:
        raise WeightsError(f"{states[0]} needs config.json and tokenizer.json of its language model beside it")
    fields = {**_rates_in_name(states[0].stem), **by_kind.get("fields", {})}
    config = published_config(state, by_kind["language_model"], by_kind.get("whisper"), fields)
    model = LlamaMtsk(config, Tokenizer.from_file(str(tokenizers[0])))
    missing, unknown = model.load_state_dict(published_weights(state, config), strict=False)
    if missing or unknown:
        shown = [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
        raise WeightsError(f"{states[0]} does not fit: {'; '.join(shown[:10])}")
    return model.eval()


def published_config(
    state: Mapping[str, Tensor],
    language_model: Mapping[str, Any],
    whisper: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> MtskConfig:
    """What a published state dict is a model of.

    Args:
        state: names as in the authors' code.
        language_model: the `config.json` of its language model.
        whisper: that of its Whisper.
        fields: of `MtskConfig`, as plain data, in place of what is read off the tensors.
    """
    if any(".MoE_adapter." in key for key in state):
        raise WeightsError("this is a mixture of experts (MoME), not Llama-MTSK")
    given = dict(fields or {})
    lm = describe(AutoConfig.for_model(**language_model))
    # Five rows were appended: <pad> and the markers.
    lm = replace(lm, vocab_size=len(state["llm.model.embed_tokens.weight"]), tie_word_embeddings=_tied(state))
    sizes: dict[str, Any] = {"language_model": to_plain(lm), "audio": None, "video": None}
    widths = {}
    firsts = {name: _input_sizes(state, name) for name in ("audio", "video")}
    if "audio_encoder.conv1.weight" in state:
        audio = _audio_config(state, whisper)
        sizes["audio"], widths["audio"] = to_plain(audio), audio.hidden_size
    if "video_encoder.post_extract_proj.weight" in state:
        video = avhubert_config(_below(state, "video_encoder."))
        lora = state.get("video_encoder.encoder.layers.0.self_attn.lora_down_Q.weight")
        sizes["video"] = to_plain(replace(video, lora=0 if lora is None else len(lora)))
        widths["video"] = video.hidden_size
    elif firsts["video"]:
        widths["video"] = _state_size(firsts["video"], given.get("video_rates", ()))
        sizes["video"] = to_plain(VideoConfig(hidden_size=widths["video"], features_only=True))
    stacked = any(any(w != widths[name] for w in rows) for name, rows in firsts.items() if rows)
    for name, rows in firsts.items():
        rates = [w // widths[name] for w in rows] if stacked else given.get(f"{name}_rates", ())
        if len(rates) != len(rows) and len(rows) != 1:
            raise WeightsError(
                f"{len(rows)} {name} projectors but {len(rates)} rates; give {name}_rates in a JSON file"
            )
        sizes[f"{name}_rates"] = rates
    strategy, bottleneck = _adapters(state)
    many = "prompt_audiovisual" in state or any(".lora_down_Q.audio" in key for key in state)
    one = "avsr" if len(widths) == 2 else "asr" if "audio" in widths else "vsr"
    bos = language_model.get("bos_token_id") if lm.model_type == "llama" else None
    end = language_model.get("eos_token_id")
    plain = {
        **sizes,
        "bos_id": bos,
        "eos_id": end[0] if isinstance(end, list) else end,
        "tasks": ["asr", "vsr", "avsr"] if many else [one],
        "compression": "stack" if stacked else "average",
        "projector_hidden_size": next(
            len(v) for k, v in state.items() if re.fullmatch(r"(audio|video)_proj\..*0\.weight", k)
        ),
        "projector_norm": any(re.fullmatch(r"\w+_proj\.(\d+\.)?3\.weight", key) for key in state),
        "lora": {"strategy": strategy, "bottleneck": bottleneck},
        "compat": "released",
    }
    return from_plain(MtskConfig, {**plain, **given}, "the checkpoint")


def published_weights(state: Mapping[str, Tensor], config: MtskConfig) -> dict[str, Tensor]:
    """A published state dict under our names."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if adapter := _ADAPTER.fullmatch(key):
            for name in _adapter_names(adapter, config):
                out[name] = value
        elif head == "llm":
            out[f"language_model.{rest}"] = value
        elif head in ("audio_proj", "video_proj"):
            # Without an index in front the layer serves every rate.
            rates = getattr(config, f"{head.removesuffix('_proj')}_rates")
            indices = range(len(rates)) if rest.count(".") == 1 else [None]
            out |= {f"{head}.{rest}" if k is None else f"{head}.{k}.{rest}": value for k in indices}
        elif head == "audio_encoder" and "embed_positions" not in key:
            out[key] = value
    if config.video is not None and not config.video.features_only:
        encoder = {k: v for k, v in _below(state, "video_encoder.").items() if "lora_" not in k}
        out |= {f"video_encoder.{key}": value for key, value in avhubert_weights(encoder).items()}
    if config.language_model.tie_word_embeddings:
        out["language_model.lm_head.weight"] = out["language_model.model.embed_tokens.weight"]
    return out


def _adapter_names(found: re.Match[str], config: MtskConfig) -> list[str]:
    """Our names of a published adapter; that of a task goes to every scale of the task."""
    visual = found["owner"].startswith("video")
    count = len(config.scales)
    if visual or not (found["local"] or found["whole"] or found["task"] or found["shared"]):
        indices = [0]
    elif found["whole"] or found["shared"]:
        indices = [count]
    elif found["local"]:
        indices = [int(found["local"])]
    else:
        streams = {"asr": (True, False), "vsr": (False, True), "avsr": (True, True)}[_TASKS[found["task"]]]
        indices = [k for k, r in enumerate(config.scales) if (bool(r.audio), bool(r.video)) == streams]
    owner, name = "video_lora" if visual else "lora", found["name"].lower()
    return [f"{owner}.layers.{found['layer']}.{name}.{k}.{found['way']}.weight" for k in indices]


def _adapters(state: Mapping[str, Tensor]) -> tuple[Strategy, int]:
    found = [m for key in state if (m := _ADAPTER.fullmatch(key)) and m["owner"] == "llm.model"]
    if not found:
        raise WeightsError("the checkpoint has no adapters in its language model")
    each = any(m["local"] or m["task"] for m in found)
    whole = any(m["whole"] or m["shared"] for m in found)
    strategy: Strategy = "MSS" if each and whole else "SS" if each else "MS"
    return strategy, len(state[next(m for m in found if m["way"] == "down").string])


def _input_sizes(state: Mapping[str, Tensor], name: str) -> list[int]:
    """Input widths of the projectors of a modality, in order."""
    if f"{name}_proj.0.weight" in state:
        return [state[f"{name}_proj.0.weight"].shape[1]]
    rows: list[int] = []
    while f"{name}_proj.{len(rows)}.0.weight" in state:
        rows.append(state[f"{name}_proj.{len(rows)}.0.weight"].shape[1])
    return rows


def _state_size(inputs: Sequence[int], rates: Sequence[int]) -> int:
    """Width of a state that projectors of these input widths read, whether states are averaged or stacked."""
    if len(set(inputs)) == 1 or len(inputs) != len(rates):
        return inputs[0]
    return inputs[0] // rates[0]


def _audio_config(state: Mapping[str, Tensor], whisper: Mapping[str, Any] | None) -> AudioConfig:
    first = state["audio_encoder.conv1.weight"]
    return AudioConfig(
        hidden_size=len(first),
        num_hidden_layers=_count(state, r"audio_encoder\.layers\.(\d+)\."),
        num_attention_heads=whisper["encoder_attention_heads"] if whisper else len(first) // 64,
        intermediate_size=len(state["audio_encoder.layers.0.fc1.weight"]),
        num_mel_bins=first.shape[1],
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(pattern, key)))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _tied(state: Mapping[str, Tensor]) -> bool:
    head = state.get("llm.lm_head.weight")
    return head is None or torch.equal(head, state["llm.model.embed_tokens.weight"])


def _rates_in_name(name: str) -> dict[str, list[int]]:
    """The authors name files `..._Adown4_Vdown2_...`, `..._down3_...` or `..._pool-audio4-16_video2-5_...`."""
    found = {}
    for field, patterns in {
        "audio_rates": (r"Adown(\d+)", r"audio(\d+(?:-\d+)*)", r"^ASR.*_down(\d+)"),
        "video_rates": (r"Vdown(\d+)", r"video(\d+(?:-\d+)*)", r"^VSR.*_down(\d+)"),
    }.items():
        if match := next((m for pattern in patterns if (m := re.search(pattern, name))), None):
            found[field] = [int(rate) for rate in match[1].split("-")]
    return found


def _kind(data: Mapping[str, Any]) -> str:
    if data.get("model_type") == "whisper":
        return "whisper"
    return "language_model" if "model_type" in data else "tokenizer" if "added_tokens" in data else "fields"


def _read(path: Path) -> dict[str, Any]:
    found = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path, INERT)
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no state dict")
    return found


def _our_own(checkpoint: Mapping[str, Any]) -> HubModel:
    from tokenthrift.mtsk.training.module import MtskModule, module_options

    options = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    # What it started from has become part of its weights, and may be gone.
    module = MtskModule(**module_options({**options, "start_from": None}))
    module.load_state_dict(checkpoint["state_dict"])
    return module.model.eval()


__getattr__ = deprecated(__name__, {"AVHubertFolder": "AvHubertFolder"})
