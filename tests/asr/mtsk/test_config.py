"""Configurations: older folders, what `compat` alone means, models of ready video states."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.asr.tiny_mtsk import speech, tiny_config, tiny_model
from tokenthrift.budget import ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.hub import read_config
from tokenthrift.mtsk import LlamaMtsk, MtskConfig, Rates
from tokenthrift.mtsk.config import AudioConfig, DecodeConfig, LanguageModelConfig, VideoConfig, upgraded
from tokenthrift.mtsk.transcribing import token_limit

CARD = Path(__file__).resolve().parents[3] / "model_cards" / "mtsk-tiny-en"
OLD: dict[str, dict[str, str]] = {
    "language_model": {
        "family": "model_type",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "ffn": "intermediate_size",
        "positions": "max_position_embeddings",
        "rope": "rope_parameters",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
    "audio": {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "bins": "num_mel_bins",
    },
    "video": {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
    },
}


def test_a_folder_of_format_1_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("format_version") == 2
    config["projector_width"] = config.pop("projector_hidden_size")
    for part, names in OLD.items():
        for old, new in names.items():
            config[part][old] = config[part].pop(new)
    del config["video"]["features_only"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    loaded = LlamaMtsk.from_pretrained(tmp_path)
    assert loaded.config == model.config
    states = loaded.state_dict()
    assert all(torch.equal(states[name], value) for name, value in model.state_dict().items())
    config["audio"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    with pytest.raises(ConfigError, match="depth"):
        LlamaMtsk.from_pretrained(tmp_path)


def test_a_folder_of_format_2_is_read_as_it_is() -> None:
    assert upgraded({"audio": {"width": 3}}, 2) == {"audio": {"width": 3}}
    assert json.loads((CARD / "config.json").read_text())["format_version"] == 2
    assert read_config(CARD, LlamaMtsk).audio.hidden_size == 384


def test_released_alone_decodes_as_published() -> None:
    published, ours = MtskConfig(eos_id=0, compat="released"), MtskConfig(eos_id=0)
    assert (published.decoding.beams, published.decoding.max_new_tokens) == (15, 32)
    assert math.isinf(published.decoding.tokens_per_second)
    assert token_limit(published, 0.1) == token_limit(published, 29.0) == 32
    assert (ours.decoding.beams, ours.decoding.max_new_tokens, ours.decoding.tokens_per_second) == (1, 256, 12.0)
    assert [token_limit(ours, seconds) for seconds in (0.1, 1.0, 1.01, 29.0)] == [18, 28, 29, 256]
    with pytest.raises(ConfigError, match="no audio.trailing_silence"):
        MtskConfig(eos_id=0, compat="released", audio=AudioConfig(trailing_silence=0.5))
    set_by_hand = replace(published, decode=DecodeConfig(beams=2, max_new_tokens=7, tokens_per_second=1))
    assert (set_by_hand.decoding.beams, token_limit(set_by_hand, 9.0)) == (2, 7)


def test_tokens_to_suppress_are_of_the_vocabulary_and_not_its_end() -> None:
    with pytest.raises(ConfigError, match=r"decode\.suppress_tokens"):
        tiny_config(decode=DecodeConfig(suppress_tokens=(tiny_config().language_model.vocab_size,)))
    with pytest.raises(ConfigError, match="no text ends"):
        tiny_config(decode=DecodeConfig(suppress_tokens=(tiny_config().eos_id,)))


def test_a_constructed_model_is_in_evaluation_mode() -> None:
    video = VideoConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        channels=(4, 4, 8, 8),
        crop=32,
        trained=True,
    )
    config = tiny_config(video=video)
    model = LlamaMtsk(config, tiny_model().tokenizer)
    assert not any(module.training for module in model.modules())
    model.train()
    assert model.video_encoder is not None
    assert model.video_encoder.training


def features_model(**changes: Any) -> LlamaMtsk:
    return tiny_model(video=VideoConfig(hidden_size=24, features_only=True), **changes)


def test_a_model_of_ready_video_states_needs_no_visual_encoder(tmp_path: Path) -> None:
    model = features_model(tasks=("avsr", "asr", "vsr"))
    assert model.video_encoder is None
    assert not [name for name in model.state_dict() if name.startswith("video_encoder")]
    states = torch.randn(25, 24, generator=torch.Generator().manual_seed(0))
    (found,) = model.transcribe([speech(1.0, 1)], [states], rates=Rates(4, 2))
    assert found.usage == model.plan([ItemSize(seconds=1.0, frames=25)], rates=Rates(4, 2))[0]
    together = model.transcribe([None, None], [states, states[:9]])
    alone = model.transcribe([None], [states[:9]])
    assert together[1].text == alone[0].text
    model.save_pretrained(tmp_path)
    loaded = LlamaMtsk.from_pretrained(tmp_path)
    assert loaded.transcribe([None], [states])[0].text == together[0].text
    with pytest.raises(ValueError, match="no visual encoder"):
        model.encode(None, [torch.zeros(3, 40, 40)])
    with pytest.raises(ValueError, match=r"\(frames, 24\), got \(3, 25\)"):
        model.encode(None, [torch.zeros(3, 25)])
    assert model.read_lips(tmp_path / "none.mkv") is None
    with pytest.raises(ConfigError, match="no visual encoder"):
        VideoConfig(features_only=True, lora=4)


def test_a_model_with_a_visual_encoder_takes_its_states_too() -> None:
    model = tiny_model()
    crops = torch.randint(0, 256, (20, 36, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    states, _ = model.encode_video([crops])
    one, other = (model.transcribe([speech(0.8, 1)], [video]) for video in (crops, states[0]))
    assert one[0].text == other[0].text
    assert one[0].usage == other[0].usage
    mixed = model.transcribe([speech(0.8, 1)] * 2, [crops, states[0]])
    assert [transcript.text for transcript in mixed] == [one[0].text] * 2


def test_sizes_of_a_language_model_have_the_names_of_transformers() -> None:
    assert LanguageModelConfig(hidden_size=64).hidden_size == 64
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        LanguageModelConfig(num_attention_heads=3, num_key_value_heads=2)
