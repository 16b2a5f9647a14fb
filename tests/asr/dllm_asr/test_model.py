"""dLLM-ASR as a model: the contract of all models over three families, its configuration and its folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.asr.tiny_dllm import FFN, HEADS, LAYERS, WIDTH, Family, speech, tiny_config, tiny_model, vocabulary
from tests.model_contract import ModelContract, Outputs
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of
from tokenthrift.dllm_asr.config import BackboneConfig, DecodeConfig, DllmAsrConfig, EncoderConfig
from tokenthrift.dllm_asr.draft import CHARACTERS, DraftWord, character_ids, ctc_loss
from tokenthrift.dllm_asr.training.config import ExampleConfig
from tokenthrift.dllm_asr.training.corruption import diffusion_loss
from tokenthrift.dllm_asr.training.examples import build_batch
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.hub import ConfigError, HubModel, WeightsError, read_config
from tokenthrift.transcript import Recognizer
from tokenthrift.whisper import states_of

ROOT = Path(__file__).resolve().parents[3]
VERSION_1 = Path(__file__).parent / "version_1"
FAMILIES: tuple[Family, ...] = get_args(Family)
Item = tuple[Tensor, str]


class Contract(ModelContract):
    """Draft and denoiser over the same encoder, with both losses."""

    family: Family
    tolerance = 1e-4  # of logits that go up to 50

    def build(self) -> DllmAsr:
        return tiny_model(self.family)

    def items(self) -> list[Item]:
        return [(speech(0.7, 1), "the dog"), (speech(1.3, 2), "jumps over it"), (speech(0.3, 3), "a")]

    def canvas(self, items: list[Item]) -> tuple[Tensor, Tensor]:
        """Every second token of the text hidden, and two more slots."""
        vocab = vocabulary()
        rows = [[t for w in text.split() for t in vocab.word(w)] for _, text in items]
        rows = [[t if i % 2 else vocab.mask_id for i, t in enumerate(row)] + [vocab.mask_id] * 2 for row in rows]
        width = max(map(len, rows))
        mask = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
        return torch.tensor([r + [vocab.eos_id] * (width - len(r)) for r in rows]), mask

    def outputs(self, model: DllmAsr, items: list[Item]) -> Outputs:
        states, lengths = model.encode([samples for samples, _ in items])
        ids, mask = self.canvas(items)
        memory, memory_mask = model.adapter(states, lengths)
        logits = model.backbone(ids, mask, model.backbone.context(memory, memory_mask))[..., : vocabulary().mask_id]
        log_p = model.draft(states, lengths)
        return [[log_p[i, :n], logits[i][mask[i]]] for i, n in enumerate(lengths.tolist())]

    def shapes(self, model: DllmAsr, item: Item) -> list[tuple[int, ...]]:
        slots = self.canvas([item])[0].shape[1]
        return [(states_of(len(item[0])), len(CHARACTERS) + 1), (slots, vocabulary().mask_id)]

    def loss(self, model: DllmAsr, items: list[Item]) -> Tensor:
        states, lengths = (part.clone() for part in model.encode([samples for samples, _ in items]))
        texts, seconds = [text for _, text in items], (lengths / 50).tolist()
        drafts = [[DraftWord("dogs", 0.5, 0.1, 0.6)], [DraftWord("jumps", 0.5, 0.1, 0.6)], []][: len(items)]
        made = build_batch(
            texts,
            seconds,
            drafts,
            range(len(texts)),
            vocabulary(),
            ExampleConfig(partially_decoded_prob=0),
            max_slots=64,
        )
        context = model.backbone.context(*model.adapter(states, lengths))
        windows = made.windows * 50 / (model.config.adapter.pool * model.config.adapter.stride)
        logits = model.backbone(made.corrupted.ids, made.mask, context, windows, made.hints)
        return diffusion_loss(logits, made.targets, made.mask, made.corrupted) + ctc_loss(
            model.draft(states, lengths), lengths, [character_ids(t) for t in texts]
        )


class TestWhisper(Contract):
    family = "whisper"


class TestBert(Contract):
    family = "bert"


class TestLlama(Contract):
    family = "llama"


def test_it_is_a_recognizer(whisper: DllmAsr) -> None:
    assert isinstance(whisper, Recognizer)
    assert whisper.sample_rate == 16_000


def test_the_vocabulary_travels_with_the_model(whisper: DllmAsr, tmp_path: Path) -> None:
    whisper.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = DllmAsr.from_pretrained(tmp_path)
    assert loaded.vocabulary.tokenizer.get_vocab() == whisper.vocabulary.tokenizer.get_vocab()
    own = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in tmp_path.iterdir()} == own | {"preprocessor_config.json", "tokenizer_config.json"}
    config = replace(whisper.config, draft=replace(whisper.config.draft, num_hidden_layers=2))
    DllmAsr(config, vocabulary()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"draft\.layers\.1"):
        DllmAsr.from_pretrained(tmp_path / "other")


def test_loaded_weights_lie_by_columns_and_are_what_they_were(whisper: DllmAsr, tmp_path: Path) -> None:
    whisper.save_pretrained(tmp_path / "one", dtype=torch.float32)
    loaded = DllmAsr.from_pretrained(tmp_path / "one")
    decoder = decoder_of(loaded)
    first: Any = decoder.layers[0]
    for weight in (first.fc1.weight, decoder.embed_tokens.weight, loaded.draft.output.weight):
        assert weight.t().is_contiguous()
    loaded.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 124 tokens, the configuration says 124\d"):
        DllmAsr(replace(tiny_config("whisper"), vocab_size=1240), vocabulary())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: EncoderConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
        (lambda: BackboneConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
        (lambda: BackboneConfig(max_position_embeddings=8), "max_position_embeddings must be between 16"),
        (lambda: DecodeConfig(confidence_threshold=0.0), "confidence_threshold must be between"),
        (lambda: DecodeConfig(extra_slots_ratio=-0.1), "extra_slots_ratio must be between"),
        (lambda: DllmAsrConfig(vocab_size=4), "vocab_size must be between"),
        (
            lambda: replace(tiny_config("whisper"), encoder=EncoderConfig()),
            "backbone.hidden_size 32 must equal encoder.hidden_size",
        ),
    ],
)
def test_configurations_out_of_range_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_sizes_are_those_of_the_configuration(whisper: DllmAsr) -> None:
    assert whisper.encoder.conv1.weight.shape == (WIDTH, 80, 3)
    assert len(whisper.encoder.layers) == LAYERS
    first: Any = whisper.encoder.layers[0]
    assert (first.fc1.out_features, first.self_attn.heads) == (FFN, HEADS)
    assert not any(p.requires_grad for p in whisper.encoder.parameters())


@pytest.mark.parametrize("kind", [DllmAsr, AutoregressiveDecoder])
def test_folders_of_the_first_format_still_load(kind: type[HubModel], tmp_path: Path) -> None:
    """The configurations that release 0.1.0 shipped, under today's names."""
    fields = json.loads((VERSION_1 / f"{kind.system}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path, kind)
    assert config.encoder == EncoderConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6)
    assert config.draft.hidden_size == 256
    assert config.backbone.max_position_embeddings == 256
    old = fields["decode"]
    assert config.decode.extra_slots_ratio == old["slack"]
    assert config.decode.extra_slots_at_end == old["margin"]
    assert config.decode.verify_threshold == old["verify"]
    assert config.decode.verify_committed == old.get("recheck", False)
    assert config.decode.slots_per_second == old["tokens_per_second"]
    fields["backbone"]["hight"] = 3
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="unknown field 'hight'"):
        read_config(tmp_path, kind)


def test_shipped_folders_are_of_todays_format_and_mean_what_they_meant(tmp_path: Path) -> None:
    assert json.loads((ROOT / "model_cards/dllm-asr-tiny-en/config.json").read_text())["format_version"] == 2
    (tmp_path / "config.json").write_text((VERSION_1 / f"{AutoregressiveDecoder.system}.json").read_text())
    baseline = read_config(tmp_path, AutoregressiveDecoder)
    words = Vocabulary.load(ROOT / "model_cards/dllm-asr-tiny-en/tokenizer.json")
    AutoregressiveDecoder(baseline, words).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["format_version"] == 2
    assert baseline == read_config(tmp_path / "saved", AutoregressiveDecoder)


def test_a_constructed_model_is_in_evaluation_mode() -> None:
    """Dropout of a language model of transformers would otherwise change every transcript."""
    for family in FAMILIES:
        model = DllmAsr(tiny_config(family), vocabulary())
        assert not any(part.training for part in model.modules())
    assert not AutoregressiveDecoder(tiny_config("whisper"), vocabulary()).training
