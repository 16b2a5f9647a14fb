"""Models assembled around checkpoints that transformers itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import WhisperForConditionalGeneration as ReferenceWhisper

from tests.asr.tiny_dllm import FFN, HEADS, LAYERS, WIDTH, speech, write_bpe, write_whisper, write_wordpiece
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.pretrained import assemble
from tokenthrift.whisper import log_mel

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


def make(whisper: Path, language_model: Path | None = None, size: int = 90, stride: int = 1) -> DllmAsr:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = None if language_model is None else str(language_model)
        adapter = AdapterConfig(stride=stride)
        return assemble(str(whisper), source, vocab_size=size, max_position_embeddings=64, adapter=adapter).eval()


def write_bert(folder: Path, **options: Any) -> Path:
    tokenizer = Tokenizer.from_file(str(write_wordpiece(folder / "tokenizer.json")))
    return save(BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES, **options)), folder)


def write_llama(folder: Path, **options: Any) -> Path:
    tokenizer = Tokenizer.from_file(str(write_bpe(folder / "tokenizer.json")))
    return save(LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES, **options)), folder)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_encoder_is_that_of_the_checkpoint(whisper: Path) -> None:
    model, samples = make(whisper), speech(30.0)
    reference: Any = ReferenceWhisper.from_pretrained(whisper).eval()
    with torch.no_grad():
        expected = reference.model.encoder(log_mel(samples)[None]).last_hidden_state
    states, lengths = model.encode([samples])
    assert lengths.tolist() == [1500]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


def test_decoder_is_that_of_the_checkpoint_with_a_cut_vocabulary(whisper: Path) -> None:
    model = make(whisper)
    vocab, weights = model.vocabulary, load_file(whisper / "model.safetensors")
    whole = Tokenizer.from_file(str(whisper / "tokenizer.json"))
    old, new = weights["model.decoder.embed_tokens.weight"], decoder_of(model).embed_tokens.weight
    for i in range(vocab.size - 4):
        assert torch.equal(new[i], old[whole.token_to_id(str(vocab.tokenizer.id_to_token(i)))])
    assert torch.equal(new[vocab.start_id], old[whole.token_to_id("<|notimestamps|>")])
    assert torch.equal(new[vocab.eos_id], old[whole.token_to_id("<|endoftext|>")])
    torch.testing.assert_close(new[vocab.mask_id], new[: vocab.size - 4].mean(0))
    for name, tensor in decoder_of(model).state_dict().items():
        if not name.startswith("embed"):
            assert torch.equal(tensor, weights[f"model.decoder.{name}"])
    assert torch.equal(decoder_of(model).embed_positions.weight, weights["model.decoder.embed_positions.weight"][:64])


def write_grouped(folder: Path) -> Path:
    return write_llama(folder, num_key_value_heads=2, rms_norm_eps=1e-5)


@pytest.mark.parametrize("write", [write_bert, write_llama, write_grouped])
def test_language_models_keep_their_weights_and_can_be_saved(whisper: Path, tmp_path: Path, write: Any) -> None:
    lm = write(tmp_path)
    model = make(whisper, lm, stride=2)
    backbone = model.backbone
    assert isinstance(backbone, PrefixBackbone)
    assert model.config.backbone.max_position_embeddings == 128
    vocab, whole = model.vocabulary, Tokenizer.from_file(str(lm / "tokenizer.json"))
    source = read_source(lm)
    old, new = source.get_input_embeddings().weight, backbone.lm.get_input_embeddings().weight
    for i in range(vocab.size - 4):
        assert torch.equal(new[i], old[whole.token_to_id(str(vocab.tokenizer.id_to_token(i)))])
    model.save_pretrained(tmp_path / "saved")
    loaded = DllmAsr.from_pretrained(tmp_path / "saved")
    audio = [speech(0.6), speech(0.2)]
    assert loaded.transcribe(audio) == model.transcribe(audio)


def read_source(folder: Path) -> Any:
    """The language model of a folder, as transformers reads it."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return {"BertForMaskedLM": BertForMaskedLM, "LlamaForCausalLM": LlamaForCausalLM}[kind].from_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (write_llama, {"hidden_act": "gelu"}, "the model's hidden_act is gelu"),
        (write_bert, {"hidden_act": "relu"}, "the model's hidden_act is relu"),
        (
            write_bert,
            {"layer_norm_eps": 1e-5},
            "could not be saved: layer_norm_eps 1e-05 instead of 1e-12",
        ),
    ],
)
def test_what_a_model_folder_cannot_say_is_refused(
    whisper: Path, tmp_path: Path, write: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(whisper, write(tmp_path, **options), stride=2)


def test_a_whisper_needs_its_start_tokens(whisper: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(whisper / name)
    text = (whisper / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|notimestamps|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"has no <\|notimestamps\|>, so it is not Whisper's"):
        make(tmp_path)


def test_without_a_convolution_widths_must_agree(whisper: Path, tmp_path: Path) -> None:
    lm = write_bert(tmp_path)
    assert make(whisper, lm, stride=1).adapter.projection is None
    config = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * WIDTH}))
    with pytest.raises(ValueError, match="must equal encoder.hidden_size"):
        make(whisper, lm, stride=1)
