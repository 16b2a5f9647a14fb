"""The data recipe of dLLM-ASR: features and drafts, Whisper out of a package, configurations, on a scale of seconds."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.asr.tiny_dllm import WIDTH, speech, tiny_model, write_shard, write_whisper
from tests.recipes.dllm_scripts import RATE, RECIPE, run, script, write_speech
from tokenthrift.cli import main
from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.draft import DraftHead, draft_words
from tokenthrift.dllm_asr.training.data import CachedStates
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.whisper import log_mel, states_of

few = settings(deadline=None, max_examples=25)
sentences, features, recordings, synthesise = map(script, ("sentences", "features", "recordings", "synthesise"))


@given(st.lists(st.floats(0.1, 8.0), min_size=1, max_size=12), st.integers(0, 99), st.floats(4.0, 20.0))
@few
def test_joining_uses_every_clip_once_and_keeps_to_the_limit(seconds: list[float], seed: int, limit: float) -> None:
    clips = [(torch.full((round(s * RATE / 100),), float(i + 1)), str(i + 1)) for i, s in enumerate(seconds)]
    features_rate = features.RATE
    features.RATE = RATE // 100  # a hundredth of the samples
    try:
        joined = features.join(list(clips), random.Random(seed), limit)
    finally:
        features.RATE = features_rate
    used = [word for _, text in joined for word in text.split()]
    assert sorted(used, key=int) == [text for _, text in clips]
    for audio, text in joined:
        # What is heard is what is written, in that order, with silence between.
        heard = audio[audio != 0].int()
        assert [str(int(i)) for i in heard[torch.cat([torch.tensor([True]), heard.diff() != 0])]] == text.split()
        assert len(heard) == sum(len(clips[int(word) - 1][0]) for word in text.split())
        # Up to 0.2 s of silence more than reckoned with, and both edges.
        if " " in text:
            assert len(audio) <= (limit + 0.2 + 0.6) * RATE / 100 + 2


def test_silence_around_a_long_clip_leaves_it_within_one_pass_of_the_encoder() -> None:
    for seed in range(20):
        ((audio, _),) = features.join([(torch.ones(round(29.8 * RATE)), "a")], random.Random(seed), 20.0)
        assert round(29.8 * RATE) <= len(audio) <= 30 * RATE


def test_joining_is_seeded_and_leaves_some_clips_single() -> None:
    clips = [(torch.ones(RATE), str(i)) for i in range(60)]
    texts = [text for _, text in features.join(list(clips), random.Random(0), 20.0)]
    assert texts == [text for _, text in features.join(list(clips), random.Random(0), 20.0)]
    sizes = [len(text.split()) for text in texts]
    assert 1 in sizes
    assert max(sizes) > 4


@given(st.integers(0, 999))
@few
def test_augmented_speech_stays_within_bounds(seed: int) -> None:
    audio = speech(0.5)
    noises, rooms = [speech(0.2, 5), torch.ones(10)], [torch.tensor([1.0, 0.0, 0.5, 0.2])]
    made = features.augment(audio, random.Random(seed), noises, rooms)
    assert torch.equal(made, features.augment(audio, random.Random(seed), noises, rooms))
    assert made.isfinite().all()
    assert 0.05 < made.abs().max() <= 0.9 + 1e-6
    assert len(audio) / 1.11 < len(made) < len(audio) / 0.89


def test_speech_is_not_slowed_down_beyond_25_seconds() -> None:
    lengths = {len(features.augment(speech(24.0), random.Random(seed), [], [])) for seed in range(12)}
    assert max(lengths) == 24 * RATE
    assert min(lengths) < 24 * RATE  # but it is made faster, and nothing is cut
    assert features.augment(torch.zeros(1000), random.Random(0), [], []).isfinite().all()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


def test_encoded_utterances_keep_their_order(whisper: Path) -> None:
    encoder = features.load_encoder(str(whisper))
    audio = [speech(seconds, seed) for seed, seconds in enumerate((0.5, 1.2, 0.3, 0.9))]
    states, texts = features.encode(encoder, [(samples, str(i)) for i, samples in enumerate(audio)], seconds=2.0)
    assert texts == ["0", "1", "2", "3"]
    for samples, row in zip(audio, states, strict=True):
        mel = log_mel(samples)
        with torch.no_grad():
            alone = encoder(mel[None], torch.tensor([mel.shape[1] // 2]))[0]
        assert row.dtype == torch.float16
        assert row.shape == (states_of(len(samples)), WIDTH)
        assert (row - alone).square().mean().sqrt() < 0.05  # bfloat16


def test_speech_becomes_features(whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, out, noise = tmp_path / "speech", tmp_path / "features", tmp_path / "noise"
    write_speech(shards)
    noise.mkdir()
    soundfile.write(noise / "noise-1.flac", speech(0.4, 8).numpy(), RATE)
    soundfile.write(noise / "rir-1.flac", np.r_[1.0, np.zeros(99), 0.3].astype(np.float32), RATE)
    options = (shards, out, "--whisper", whisper, "--noise", noise, "--real-passes", 2)
    run(monkeypatch, features, *options)
    made = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert sorted(made) == [
        "0003-slt-0.safetensors",
        "9000-real-0.safetensors",
        "9000-real-1.safetensors",
        "dev-0003-slt.safetensors",
        "made.json",
    ]
    for name, letters in (("0003-slt-0", "acd"), ("9000-real-1", "abcd"), ("dev-0003-slt", "b")):
        data = CachedStates([out / f"{name}.safetensors"])
        items = [data[0, i] for i in range(len(data))]
        assert sorted(letter for item in items for letter in item.text.split()) == list(letters)
        assert all(item.states.shape[1] == WIDTH and item.states.isfinite().all() for item in items)
        assert all(len(item.states) >= 20 * len(item.text.split()) for item in items)
    run(monkeypatch, features, *options)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == made
    # Another seed joins and augments all anew, in a folder of its own; development utterances stay.
    with pytest.raises(SystemExit, match="give another folder"):
        run(monkeypatch, features, *options, "--seed", 1)
    run(monkeypatch, features, shards, tmp_path / "other", *options[2:], "--seed", 1)
    for name in ("dev-0003-slt", "0003-slt-0", "9000-real-0"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (out, tmp_path / "other"))
        same = ours["states"].shape == theirs["states"].shape and torch.equal(ours["states"], theirs["states"])
        assert same == name.startswith("dev-")


def draft_checkpoint(path: Path) -> DraftHead:
    """A checkpoint of a training of the draft alone, and its head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DraftHead(DraftConfig(), WIDTH).eval()
        torch.nn.init.normal_(head.output.weight, std=1.0)
    state = {f"model.draft.{name}": value for name, value in head.state_dict().items()}
    options = {"config": {"train_draft": True, "train_denoiser": False}}
    torch.save({"state_dict": {**state, "model.other": torch.zeros(1)}, "hyper_parameters": options}, path)
    return head


@pytest.mark.parametrize("source", ["last.ckpt", "model"])
def test_drafts_are_what_the_head_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    head = draft_checkpoint(tmp_path / "last.ckpt")
    if source == "model":
        model = tiny_model()
        model.save_pretrained(tmp_path / "model")
        head = model.draft
    shard = write_shard(tmp_path / "features" / "0000-slt-0.safetensors", ["the dog", "a", "jumps over"])
    write_shard(tmp_path / "features" / "dev-0000-slt.safetensors", ["held out"])
    run(monkeypatch, script("drafts"), tmp_path / "features", "--draft", tmp_path / source)
    written = sorted(p.name for p in (tmp_path / "features").glob("*.json"))
    assert written == ["0000-slt-0.drafts.json"]
    data = CachedStates([shard])
    assert sum(len(data[0, i].draft) for i in range(3)) > 3
    for i in range(3):
        item = data[0, i]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            expected = draft_words(head(item.states[None].float(), torch.tensor([len(item.states)]))[0])
        # In bfloat16 a neighbor in the batch may tip a frame; nearly all words are the same.
        same = [w for w in item.draft if any(w.text == e.text and abs(w.start - e.start) < 1e-6 for e in expected)]
        assert len(same) >= 0.7 * len(expected)


def test_drafts_of_an_untrained_head_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every checkpoint holds a head, but one of the denoiser alone holds random weights."""
    draft_checkpoint(tmp_path / "last.ckpt")
    data = torch.load(tmp_path / "last.ckpt", weights_only=True)
    data["hyper_parameters"] = {"config": {"train_draft": False, "train_denoiser": True}}
    torch.save(data, tmp_path / "denoiser.ckpt")
    with pytest.raises(SystemExit):
        run(monkeypatch, script("drafts"), tmp_path, "--draft", tmp_path / "denoiser.ckpt")
    assert f"the CTC head was not trained in {tmp_path}/denoiser.ckpt" in capsys.readouterr().err


def ctranslate2(tensors: dict[str, torch.Tensor]) -> bytes:
    """A CTranslate2 model file, as its format is described: names, shapes, types and bytes, one after another."""
    out = struct.pack("<I", 6) + struct.pack("<H", 12) + b"WhisperSpec\0" + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        array = tensor.numpy().astype(np.float16 if tensor.is_floating_point() else np.int8)
        out += struct.pack("<H", len(name) + 1) + name.encode() + b"\0" + struct.pack("B", array.ndim)
        out += struct.pack(f"<{array.ndim}I", *array.shape) + struct.pack("B", 4 if array.dtype == np.float16 else 1)
        out += struct.pack("<I", array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def renamed(state: dict[str, torch.Tensor], layers: int, heads: int) -> dict[str, torch.Tensor]:
    """transformers' names and layout to CTranslate2's."""
    out = {"encoder/num_heads": torch.tensor(heads)}

    def norm(old: str, new: str) -> None:
        out[f"{new}/gamma"], out[f"{new}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]

    def linear(parts: list[str], new: str) -> None:
        weights = [state[f"{part}.weight"] for part in parts]
        biases = [state.get(f"{part}.bias", torch.zeros(len(w))) for part, w in zip(parts, weights, strict=True)]
        out[f"{new}/weight"], out[f"{new}/bias"] = torch.cat(weights), torch.cat(biases)

    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        for i in range(layers):
            old, new = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            linear([f"{old}.self_attn.{x}_proj" for x in "qkv"], f"{new}/self_attention/linear_0")
            linear([f"{old}.self_attn.out_proj"], f"{new}/self_attention/linear_1")
            norm(f"{old}.self_attn_layer_norm", f"{new}/self_attention/layer_norm")
            if side == "decoder":
                linear([f"{old}.encoder_attn.q_proj"], f"{new}/attention/linear_0")
                linear([f"{old}.encoder_attn.{x}_proj" for x in "kv"], f"{new}/attention/linear_1")
                linear([f"{old}.encoder_attn.out_proj"], f"{new}/attention/linear_2")
                norm(f"{old}.encoder_attn_layer_norm", f"{new}/attention/layer_norm")
            linear([f"{old}.fc1"], f"{new}/ffn/linear_0")
            linear([f"{old}.fc2"], f"{new}/ffn/linear_1")
            norm(f"{old}.final_layer_norm", f"{new}/ffn/layer_norm")
    for i in (1, 2):
        out[f"encoder/conv{i}/weight"] = state[f"model.encoder.conv{i}.weight"]
        out[f"encoder/conv{i}/bias"] = state[f"model.encoder.conv{i}.bias"]
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return out


def test_a_ctranslate2_whisper_becomes_a_transformers_one(whisper: Path) -> None:
    package = script("whisper_from_package")
    expected = load_file(whisper / "model.safetensors")
    config = json.loads((whisper / "config.json").read_text())
    heads, layers = config["encoder_attention_heads"], config["encoder_layers"]
    file = io.BytesIO(ctranslate2(renamed(expected, layers, heads)))
    state, found = package.translate(package.read_model(file))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.half().float()), name
    for field in (
        "vocab_size",
        "d_model",
        "num_mel_bins",
        "encoder_layers",
        "decoder_ffn_dim",
        "decoder_attention_heads",
    ):
        assert found[field] == config[field]


@pytest.mark.parametrize("overlay", [None, "minilm", "autoregressive"])
def test_recipes_are_understood(overlay: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["tiny"] + ([overlay] if overlay else [])
    files = [argument for name in names for argument in ("--config", str(RECIPE / f"{name}.yaml"))]
    with pytest.raises(SystemExit) as caught:
        main(["fit", *files, "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    model, data = printed["model"], printed["data"]
    kind = "AutoregressiveModule" if overlay == "autoregressive" else "DllmAsrModule"
    assert model["class_path"].endswith(f".{kind}")
    assert data["class_path"].endswith(".DllmAsrDataModule")
    assert model["init_args"]["config"]["vocab_size"] == (8000 if overlay == "minilm" else 5000)
    assert model["init_args"]["config"]["whisper"] == "data/dllm_asr/encoder"
    assert printed["trainer"]["max_steps"] % printed["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] == 0
    assert printed["trainer"]["gradient_clip_val"] == 1.0
