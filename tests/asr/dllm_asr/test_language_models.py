"""Published language models in a dLLM-ASR, by family and source: tiny folders with the published key names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tests.asr.tiny_dllm import WIDTH, speech, vocabulary, write_bpe, write_whisper, write_wordpiece
from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.tokenizer_files import source_tokenizer
from tokenthrift.budget import BudgetError
from tokenthrift.config import ConfigError, from_plain
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.config import AdapterConfig, BackboneConfig, DllmAsrConfig, DraftConfig, LoraConfig
from tokenthrift.dllm_asr.pretrained import assemble, assemble_around, encoder_of
from tokenthrift.sources import SourceError, WeightsError

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 512}
GROUPED = {**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
DRAFT = DraftConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
LLADA = {
    **{"model_type": "llada", "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48},
    **{"max_sequence_length": 512, "rope": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False},
    **{"layer_norm_type": "rms", "block_type": "llama", "activation_type": "silu", "include_bias": False},
    **{"architectures": ["LLaDAModelLM"], "auto_map": {"AutoModel": "remote.Code"}},
}
LLADA_NAMES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
FAMILIES = ["llada", "dream", "a2d-qwen2", "a2d-qwen3", "a2d-llama", "fast_dllm_v2", "modernbert", "bert"]


def random_lm(config: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = language_model(config)
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return lm.eval()


def llada_name(name: str) -> str:
    top = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"model.transformer.{top[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"model.transformer.blocks.{layer}.{LLADA_NAMES[rest]}.weight"


def write_source(folder: Path, kind: str) -> tuple[str, Path]:
    """A folder as published; the family that reads it."""
    folder.mkdir(parents=True)
    family, _, model_type = kind.partition("-")
    if family == "bert":
        tokenizer = Tokenizer.from_file(str(write_wordpiece(folder / "tokenizer.json")))
    else:
        tokenizer = Tokenizer.from_file(str(write_bpe(folder / "tokenizer.json")))
    mask = tokenizer.get_vocab_size() + 1  # as LLaDA's: a row beyond what the tokenizer lists
    rows = tokenizer.get_vocab_size() + 8
    own: dict[str, Any] = {"vocab_size": rows, "mask_token_id": mask, "eos_token_id": 7}
    if family == "llada":
        lm = random_lm(
            {
                **{**SIZES, "model_type": "llama", "vocab_size": rows, "rms_norm_eps": 1e-5},
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            }
        )
        (folder / "config.json").write_text(json.dumps({**LLADA, **own, "embedding_size": rows}))
        state = {llada_name(name): tensor for name, tensor in lm.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        return family, folder
    types = {"dream": ("Dream", "qwen2"), "fast_dllm_v2": ("Fast_dLLM_Qwen", "qwen2"), "bert": ("bert", "bert")}
    types |= {"modernbert": ("modernbert", "modernbert"), "a2d": (f"a2d-{model_type}", model_type)}
    published, name = types[family]
    sizes = SIZES if name in ("bert", "modernbert") else GROUPED
    lm = random_lm({**sizes, "model_type": name, "vocab_size": rows})
    lm.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **own, "model_type": published, "bd_size": 8}))
    return family, folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


def around(whisper: Path, kind: str, folder: Path, **options: Any) -> DllmAsr:
    family, source = write_source(folder, kind)
    fields = {"family": family, "source": str(source), "prompt": "the {audio} fox", **options.pop("backbone", {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return assemble_around(
            encoder_of(str(whisper)),
            from_plain(BackboneConfig, fields),
            adapter=AdapterConfig(),
            draft=DRAFT,
            **options,
        )


def texts(model: DllmAsr) -> list[Any]:
    audio = [speech(0.9), speech(0.4, seed=1)]
    return [*model.transcribe(audio, decode={"max_rounds": 4})]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_source_is_named_and_not_copied(whisper: Path, tmp_path: Path, kind: str) -> None:
    """Its family and name are all that a configuration has to say, and all of its weights that a folder holds."""
    model = around(whisper, kind, tmp_path / "lm")
    lm: Any = model.backbone.lm
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in lm.parameters())
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["backbone"]["source"] == str(tmp_path / "lm")
    heads = saved["backbone"]["language_model"]["num_key_value_heads"]
    assert heads == {"llada": 4, "bert": None, "modernbert": None}.get(kind, 2)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name.partition(".")[0] for name in stored} == {"adapter", "draft"}
    loaded = DllmAsr.from_pretrained(tmp_path / "saved")
    assert texts(loaded) == texts(model)
    # The tokenizer may lie with the source too.
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert texts(DllmAsr.from_pretrained(tmp_path / "saved")) == texts(model)


def test_family_and_source_are_enough(whisper: Path, tmp_path: Path) -> None:
    model = around(whisper, "llada", tmp_path / "lm")
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    fields = json.loads(path.read_text())
    fields["backbone"] = {"family": "llada", "source": str(tmp_path / "lm"), "prompt": "the {audio} fox"}
    path.write_text(json.dumps(fields))
    loaded = DllmAsr.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert texts(loaded) == texts(model)


def test_the_memory_stands_in_the_template(whisper: Path, tmp_path: Path) -> None:
    model = around(whisper, "llada", tmp_path / "lm", backbone={"prompt": None})
    backbone: Any = model.backbone
    write, read = model.vocabulary.tokenizer.decode, model.vocabulary.ids
    assert write(backbone.header.tolist(), skip_special_tokens=False).startswith(
        "<|startoftext|><|start_header_id|>user"
    )
    assert backbone.prompt.tolist() == read(
        "Transcribe this audio into text.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    slots = 512 - len(backbone.header) - len(backbone.prompt)
    assert model.max_slots(100) == slots - 25


@pytest.mark.parametrize("kind", ["llada", "a2d-qwen3"])
def test_adapters_are_the_models_own(whisper: Path, tmp_path: Path, kind: str) -> None:
    names = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    if kind != "llada":
        names = ["q_proj", "o_proj", "down_proj"]
    lora = {"rank": 2, "alpha": 4.0, "targets": names}
    model = around(whisper, kind, tmp_path / "lm", backbone={"lora": lora})
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone.")]
    assert len(trained) == 2 * 2 * len(names)
    assert all(".lora_" in name for name in trained)
    before = texts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert sorted(name for name in stored if name.startswith("backbone.")) == sorted(trained)
    loaded = DllmAsr.from_pretrained(tmp_path / "saved")
    assert texts(loaded) == texts(model) != before
    with pytest.raises(ConfigError, match="has no nothing"):
        around(whisper, kind, tmp_path / "other", backbone={"lora": {**lora, "targets": ["nothing"]}})


def test_a_whole_language_model_is_copied_where_it_is_trained(whisper: Path, tmp_path: Path) -> None:
    model = around(whisper, "dream", tmp_path / "lm", copy_language_model=True, copy_encoder=True)
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "lm").rename(tmp_path / "gone")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (fields["backbone"]["source"], fields["encoder"]["source"]) == (None, None)
    loaded = DllmAsr.from_pretrained(tmp_path / "saved")
    assert loaded.backbone.shifted
    assert texts(loaded) == texts(model)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_sixteen_heads_of_which_eight_hold_keys(whisper: Path, tmp_path: Path, kind: str) -> None:
    """A small vocabulary, all weights in the model's own folder."""
    sizes = {**GROUPED, "num_attention_heads": 16, "num_key_value_heads": 8}
    tokenizer = Tokenizer.from_file(str(write_bpe(tmp_path / "tokenizer.json")))
    random_lm({**sizes, "model_type": kind, "vocab_size": tokenizer.get_vocab_size()}).save_pretrained(tmp_path)
    model = assemble(
        str(whisper), str(tmp_path), vocab_size=90, max_position_embeddings=64, adapter=AdapterConfig(), draft=DRAFT
    ).eval()
    shape = model.config.backbone.language_model
    assert shape is not None
    assert (shape.num_attention_heads, shape.num_key_value_heads) == (16, 8)
    model.save_pretrained(tmp_path / "saved")
    assert texts(DllmAsr.from_pretrained(tmp_path / "saved")) == texts(model)


@pytest.mark.parametrize("kind", ["llada", "dream", "a2d-qwen3", "fast_dllm_v2"])
def test_diffusion_models_with_a_small_vocabulary(whisper: Path, tmp_path: Path, kind: str) -> None:
    _, source = write_source(tmp_path / "lm", kind)
    model = assemble(
        str(whisper), str(source), vocab_size=90, max_position_embeddings=64, adapter=AdapterConfig(), draft=DRAFT
    ).eval()
    assert model.backbone.shifted == (kind in ("dream", "fast_dllm_v2"))
    model.save_pretrained(tmp_path / "saved")
    assert texts(DllmAsr.from_pretrained(tmp_path / "saved")) == texts(model)


def without_tokenizer_json(source: Path) -> Tokenizer:
    """Leaves Dream's files: vocabulary, merges, and the added tokens among settings; the tokenizer that they make."""
    whole = json.loads((source / "tokenizer.json").read_text())
    rows, names = whole["model"]["vocab"], ["<|endoftext|>", "<|im_end|>", "<tool_call>", "<|mask|>"]
    (source / "vocab.json").write_text(json.dumps(rows))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in whole["model"]["merges"])]))
    added = {len(rows) + i: {"content": name, "special": name != "<tool_call>"} for i, name in enumerate(names)}
    settings = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["remote.Code", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": added}))
    (source / "tokenizer.json").unlink()
    tokenizer = source_tokenizer(source)
    assert {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()} == dict(
        zip(added, names, strict=True)
    )
    return tokenizer


def test_dream_has_vocabulary_and_merges_in_place_of_a_tokenizer_file(whisper: Path, tmp_path: Path) -> None:
    family, source = write_source(tmp_path / "lm", "dream")
    tokenizer = without_tokenizer_json(source)
    text = " the quick brown fox, don't<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("<tool_call><|mask|>").ids) == 2
    backbone = BackboneConfig(family=family, source=str(source), prompt="the {audio} fox")  # type: ignore[arg-type]
    model = assemble_around(encoder_of(str(whisper)), backbone, adapter=AdapterConfig(), draft=DRAFT)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert texts(DllmAsr.from_pretrained(tmp_path / "saved")) == texts(model)
    parts: dict[str, Any] = {"vocab_size": 90, "max_position_embeddings": 64, "adapter": AdapterConfig()}
    cut = assemble(str(whisper), str(source), **parts, draft=DRAFT).vocabulary
    assert cut.size <= 94
    assert cut.text(cut.word("fox")) == "fox"
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["999"] = {"content": "<far>"}
    for damaged, message in ((settings, "<far> cannot have the ids"), ({}, "which tokens were added")):
        (source / "tokenizer_config.json").write_text(json.dumps(damaged))
        with pytest.raises(ConfigError, match=message):
            source_tokenizer(source)
    (source / "merges.txt").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        source_tokenizer(source)


def test_a_word_that_the_prompt_ends_with_may_be_written(whisper: Path, tmp_path: Path) -> None:
    model = around(whisper, "llada", tmp_path / "lm", backbone={"prompt": "the {audio} fox"})
    vocabulary, backbone = model.vocabulary, cast(Any, model.backbone)
    word = vocabulary.word("fox")
    assert word[-1] == backbone.prompt[-1]
    assert vocabulary.text(word) == "fox"
    # Certified text may have it too.
    states, lengths = model.encode([speech(0.4)])
    lm = backbone.lm
    with torch.no_grad():
        lm.lm_head.weight.zero_()
        lm.model.norm.weight.zero_()
    forward = lm.forward

    def says_fox(*given: Any, **named: Any) -> Any:
        out = forward(*given, **named)
        out.logits[..., word[-1]] = 9.0
        return out

    lm.forward = says_fox
    (done,) = model.decode(states, lengths, {"certify": "ar", "max_new_tokens": 2})
    assert done.text.endswith("fox" if len(word) == 1 else vocabulary.pieces([word[-1]])[0].strip())


def test_certified_text_needs_a_token_before_it(whisper: Path, tmp_path: Path) -> None:
    model = around(whisper, "llada", tmp_path / "lm", backbone={"prompt": "the {audio}"})
    assert len(texts(model)) == 2
    with pytest.raises(BudgetError, match="no token comes before the text"):
        model.transcribe([speech(0.3)], decode={"certify": "ar"})


def test_errors_name_the_source(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs backbone.source"):
        BackboneConfig(family="llada")
    with pytest.raises(ConfigError, match="has no published weights"):
        BackboneConfig(family="whisper", source="somewhere")
    with pytest.raises(ConfigError, match="must have {audio} once"):
        BackboneConfig(family="llada", source="somewhere", prompt="audio")
    model = around(whisper, "llada", tmp_path / "lm")
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "lm" / "model.safetensors")
    del state["model.transformer.blocks.1.ff_out.weight"]
    save_file(state, tmp_path / "lm" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        DllmAsr.from_pretrained(tmp_path / "saved")
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="model.safetensors"):
        DllmAsr.from_pretrained(tmp_path / "saved")


def test_a_plain_decoder_needs_a_row_for_mask(whisper: Path, tmp_path: Path) -> None:
    _, source = write_source(tmp_path / "lm", "a2d-qwen3")
    fields = json.loads((source / "config.json").read_text())
    del fields["mask_token_id"]
    (source / "config.json").write_text(json.dumps({**fields, "model_type": "qwen3"}))
    beyond = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    named: dict[str, Any] = {"family": "a2d", "source": str(source), "prompt": "the {audio} fox"}
    parts: dict[str, Any] = {"adapter": AdapterConfig(), "draft": DRAFT}
    with pytest.raises(ConfigError, match="pass mask_id"):
        assemble_around(encoder_of(str(whisper)), BackboneConfig(**named), **parts)
    model = assemble_around(encoder_of(str(whisper)), BackboneConfig(**named, mask_id=beyond), **parts)
    vocabulary = model.vocabulary
    assert (vocabulary.mask_id, vocabulary.eos_id, vocabulary.delete_id) == (beyond, 7, beyond + 1)
    model.save_pretrained(tmp_path / "saved")
    assert texts(DllmAsr.from_pretrained(tmp_path / "saved")) == texts(model)
    with pytest.raises(ConfigError, match="different tokens"):
        assemble_around(encoder_of(str(whisper)), BackboneConfig(**named, mask_id=beyond, delete_id=beyond), **parts)
    with pytest.raises(ConfigError, match="is not language_model.mask_id"):
        replace(model.config.backbone, mask_id=3)


def test_the_default_configuration_is_as_before() -> None:
    config = DllmAsrConfig(vocab_size=vocabulary().size)
    assert (config.backbone.family, config.backbone.hidden_size, config.backbone.language_model) == (
        "whisper",
        384,
        None,
    )
    assert LoraConfig().rank == 16
    assert WIDTH == 32
