"""Llama-MTSK with `compat="released"` against what the authors' code computed, and the pieces both modes share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.asr.tiny_mtsk import BOS, EOS, LLAMA3, characters
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, avhubert_weights
from tokenthrift.mtsk.config import LanguageModelConfig, Strategy
from tokenthrift.mtsk.convert import published_config, published_weights
from tokenthrift.mtsk.language_model import build
from tokenthrift.mtsk.lora import Lora, attentions
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.reducers.pooling import pool_by_rate

LANGUAGE_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 34,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA3,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
WHISPER = {"model_type": "whisper", "encoder_attention_heads": 4}


@cache
def load(folder: Path, name: str, rates: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[LlamaMtsk, Any]:
    """The authors' model, whose video features were given, so it has no visual encoder."""
    state = load_file(folder / f"{name}_weights.safetensors")
    fields = {"audio_rates": list(rates[0]), "video_rates": list(rates[1])}
    config = published_config(state, LANGUAGE_MODEL, WHISPER, fields)
    model = LlamaMtsk(config, characters())
    model.load_state_dict(published_weights(state, config))
    return model.eval(), np.load(folder / f"{name}.npz")


def tensor(values: Any, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(values[name]))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.detach(), theirs.to(ours.dtype), rtol=0, atol=tolerance)


def avsr(reference: Path) -> tuple[LlamaMtsk, Any]:
    return load(reference / "mtsk", "ms_avsr_avg", ((4, 16), (2, 5)))


def texts_of(values: Any) -> list[list[int]]:
    """The transcripts without BOS, EOS and padding."""
    return [[t for t in row.tolist() if t not in (BOS, EOS, 34)] for row in values["tokens"]]


def encoded_avsr(model: LlamaMtsk, values: Any) -> Encoded:
    # The waveforms come layer-normed; norming them again changes them by 5e-6 of their size.
    waves = tensor(values, "audio")[..., 0]
    audio = [wave[:length] for wave, length in zip(waves, values["lengths"].tolist(), strict=True)]
    states, lengths = model.encode_audio(audio)
    video = tensor(values, "video_feats")
    return Encoded(audio=states, audio_lengths=lengths, video=video, video_lengths=torch.tensor([23, 23]))


def test_whisper_states(reference: Path) -> None:
    model, values = avsr(reference)
    states = encoded_avsr(model, values).audio
    assert states is not None
    close(states, tensor(values, "whisper_out_trunc"))


@pytest.mark.parametrize(("modality", "rate"), [("audio", 4), ("audio", 16), ("video", 2), ("video", 5)])
def test_pooled_states(reference: Path, modality: str, rate: int) -> None:
    model, values = avsr(reference)
    states = tensor(values, {"audio": "whisper_out_trunc", "video": "video_feats"}[modality])
    lengths = torch.full((len(states),), states.shape[1])
    pooled, _ = pool_by_rate(states, lengths, rate, "average", whole_windows=True)
    close(pooled, tensor(values, f"{modality}_comp_{rate}"), 1e-6)


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_stacked_states(reference: Path, rate: int) -> None:
    values = np.load(reference / "mtsk" / "ms_vsr_stack.npz")
    states = tensor(values, "video_feats")
    stacked, _ = pool_by_rate(states, torch.tensor([23, 23]), rate, "stack", whole_windows=True)
    assert torch.equal(stacked, tensor(values, f"video_comp_{rate}"))


def test_sequences_labels_and_losses_of_every_scale(reference: Path) -> None:
    model, values = avsr(reference)
    encoded, texts = encoded_avsr(model, values), texts_of(values)
    assert [str(rates) for rates in model.config.scales] == ["(4, 2)", "(16, 2)", "(4, 5)", "(16, 5)"]
    for k, rates in enumerate(model.config.scales):
        rows = model.rows(encoded, texts, rates)
        close(rows.embeddings, tensor(values, f"emb_{k}"))
        assert torch.equal(rows.labels, tensor(values, f"lab_{k}"))
        assert model.loss(encoded, texts, rates).item() == pytest.approx(float(values["loss_per_scale"][k]), abs=1e-5)


def test_sequences_labels_and_losses_when_stacking(reference: Path) -> None:
    model, values = load(reference / "mtsk", "ms_vsr_stack", ((), (1, 2, 3)))
    assert model.config.compression == "stack"
    encoded = Encoded(video=tensor(values, "video_feats"), video_lengths=torch.tensor([23, 23]))
    for k, rates in enumerate(model.config.scales):
        rows = model.rows(encoded, texts_of(values), rates)
        close(rows.embeddings, tensor(values, f"emb_{k}"))
        assert torch.equal(rows.labels, tensor(values, f"lab_{k}"))
        loss = model.loss(encoded, texts_of(values), rates).item()
        assert loss == pytest.approx(float(values["loss_per_scale"][k]), abs=1e-5)


@pytest.mark.parametrize("kind", ["avsr", "vsr"])
def test_greedy_and_beam_texts(reference: Path, kind: str) -> None:
    if kind == "avsr":
        model, values = avsr(reference)
        states, lengths = model.encode_audio([tensor(values, "test_audio")[0, :, 0]])
        sound = {"audio": states, "audio_lengths": lengths}
    else:
        model, values = load(reference / "mtsk", "ms_vsr_stack", ((), (1, 2, 3)))
        sound = {}
    encoded = Encoded(video=tensor(values, "test_video_feats"), video_lengths=torch.tensor([23]), **sound)
    for k, rates in enumerate(model.config.scales):
        heads, tails = model.blocks(encoded, rates)
        close(torch.cat([heads[0], tails[0]])[None], tensor(values, f"test_emb_{k}"))
        for beams, name in ((1, "greedy"), (5, "beam5")):
            (found,) = model.generate(encoded, rates, [12], beams=beams)
            assert list(found.ids) == values[f"gen_{name}_{k}"][0].tolist()


@pytest.mark.parametrize("strategy", ["MS", "SS"])
def test_adapted_language_model(reference: Path, strategy: Strategy) -> None:
    folder = reference / "mtsk"
    values = np.load(folder / "lora_llm_ms_ss.npz")
    base = load_file(folder / "lora_ms_weights.safetensors")
    adapters = base if strategy == "MS" else load_file(folder / "lora_ss_weights.safetensors")
    sizes = LanguageModelConfig(
        vocab_size=34,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=128,
        rope_parameters=LLAMA3,
    )
    lm: Any = build(sizes)
    plain = {key: value for key, value in base.items() if "lora" not in key}
    lm.load_state_dict({**plain, "lm_head.weight": base["model.embed_tokens.weight"]})
    lora = Lora(attentions(lm.model), 4, strategy, 2, 0.125)
    named = {}
    for key, value in adapters.items():
        if "lora" in key:
            parts = key.split(".")
            place = parts[parts.index("local_loras") + 1] if "local_loras" in parts else "0"
            _, way, name = parts[-2].split("_")
            named[f"layers.{parts[2]}.{name.lower()}.{place}.{way}.weight"] = value
    lora.load_state_dict(named)
    attention: list[Tensor] = []
    lm.model.layers[0].self_attn.register_forward_hook(lambda m, i, out: attention.append(out[0]))
    embeddings, labels = tensor(values, "inputs_embeds"), tensor(values, "labels")
    for k in range(4 if strategy == "SS" else 1):
        with lora.at(k), torch.no_grad():
            logits = lm(inputs_embeds=embeddings).logits
        close(logits, tensor(values, f"{strategy.lower()}_logits_{k}"))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert loss.item() == pytest.approx(float(values[f"{strategy.lower()}_loss_{k}"]), abs=1e-5)
        if strategy == "SS":
            close(attention[-1], tensor(values, f"ss_attn0_{k}"))


def avhubert_recipe(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights that the reference outputs were made with."""
    generator = np.random.RandomState(0)
    state = {}
    for key in sorted(keys):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        values: Any = generator.standard_normal(keys[key]).astype(np.float32)
        if key.endswith("running_var"):
            values = 0.5 + np.abs(values)
        elif (len(keys[key]) == 1 and key.endswith(".weight")) or key.endswith("weight_g"):
            values = 1 + 0.1 * values
        else:
            values = 0.05 * values
        state[key] = torch.from_numpy(values)
    return state


@pytest.mark.parametrize("streams", ["video", "audio", "av"])
def test_avhubert_outputs(reference: Path, streams: str) -> None:
    keys = json.loads((reference / "mtsk" / "avhubert_tiny_keys.json").read_text())
    model = AvHubert(64, 2, 4, 128).eval()
    model.load_state_dict(avhubert_weights(avhubert_recipe(keys)))
    generator = np.random.RandomState(1)
    video = torch.from_numpy(generator.standard_normal((2, 1, 11, 88, 88)).astype(np.float32))[:, 0]
    audio = torch.from_numpy(generator.standard_normal((2, 104, 11)).astype(np.float32)).transpose(1, 2)
    given = {"video": (video, None, None), "audio": (None, None, audio), "av": (video, None, audio)}[streams]
    with torch.no_grad():
        out = model(*given)
    close(out, tensor(np.load(reference / "mtsk" / "avhubert_tiny.npz"), f"out_{streams}"))


@pytest.mark.parametrize(("size", "sizes"), [("base", (768, 12, 12, 3072)), ("large", (1024, 24, 16, 4096))])
def test_avhubert_has_every_key_of_the_public_checkpoints(
    reference: Path, size: str, sizes: tuple[int, int, int, int]
) -> None:
    keys = json.loads((reference / "mtsk" / f"avhubert_{size}_keys.json").read_text())
    with torch.device("meta"):
        ours = AvHubert(*sizes).state_dict()
        public = {key: torch.empty(shape) for key, shape in keys.items()}
    expected = avhubert_weights(public)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}
    assert set(public) - set(expected) == {"mask_emb", "label_embs_concat", "final_proj.weight", "final_proj.bias"}
