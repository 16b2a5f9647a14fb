"""The models in transformers' automatic classes: registered without a cost, and the same files, numbers and texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import tokenthrift
from tests.asr.tiny_dllm import tiny_model
from tests.asr.tiny_mtsk import tiny_model as tiny_mtsk
from tests.hub_server import HubServer
from tests.multimodal.tiny_hub import files_of
from tests.multimodal.tiny_multimodal import tiny_multimodal
from tests.tokenizers.karl.tiny_karl import tiny_karl
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.budget import ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.hub import HubModel
from tokenthrift.models import describe, list_models, load
from tokenthrift.sources import WeightsError
from tokenthrift.vqtoken import VQToken
from tokenthrift.weights import unique_tensors

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [str(ROOT / name) for name in ("multimodal", "tokenizers", "asr")]


def fresh(code: str, cwd: Path) -> str:
    """What a new interpreter prints."""
    before = f"import sys; sys.path[:0] = {ROOTS!r}\n"
    done = subprocess.run([sys.executable, "-c", before + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models() -> dict[str, HubModel]:
    mtsk = tiny_mtsk(tasks=("asr", "vsr", "avsr"))
    mtsk.tokenizer.add_special_tokens(["<bos>", "<eos>"])  # which no text shows, as with a real tokenizer
    return {"dllm_asr": tiny_model("whisper"), "mtsk": mtsk, "karl": tiny_karl()}


@pytest.fixture(scope="module", params=["dllm_asr", "mtsk", "karl"])
def saved(request: pytest.FixtureRequest, models: Any, tmp_path_factory: Any) -> tuple[HubModel, Path]:
    folder = tmp_path_factory.mktemp("auto") / request.param
    models[request.param].save_pretrained(folder)
    return models[request.param], folder


# The package


def test_the_package_has_a_version_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import tokenthrift
from tokenthrift.version import __version__
print(tokenthrift.__version__ == __version__, tokenthrift.version.__version__, *sorted(
    {"torch", "numpy", "transformers", "huggingface_hub", "lazy_loader", "lightning"} & set(sys.modules)))
"""
    assert fresh(code, tmp_path).split() == ["True", tokenthrift.__version__]
    assert {"load", "list_models", "attach", "TokenBudget"} <= set(dir(tokenthrift))
    assert tokenthrift.load is load
    with pytest.raises(AttributeError, match="nothing"):
        _ = tokenthrift.nothing


@pytest.mark.parametrize(
    "first",
    [
        "import tokenthrift, transformers",
        "import transformers, tokenthrift",
        "from transformers import AutoModel; import tokenthrift",
    ],
)
def test_the_models_are_known_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    """Also with AutoModel imported before; and the modules of transformers keep their own loaders."""
    code = f"""
{first}
from transformers import AutoConfig, AutoModel
from transformers.models.auto import configuration_auto, modeling_auto
kinds = [c.__name__ for c in modeling_auto.MODEL_MAPPING._extra_content]
print("KarlAutoConfig" in kinds, "tokenthrift_mtsk" in configuration_auto.CONFIG_MAPPING)
print(type(modeling_auto.__loader__).__name__, type(modeling_auto.__spec__.loader).__name__)
"""
    assert fresh(code, tmp_path).split() == ["True", "True", "SourceFileLoader", "SourceFileLoader"]


def test_a_failure_to_register_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenthrift.auto.AWAITED, "some.module", "tokenthrift.no_such_module")
    with pytest.warns(UserWarning, match="not known to transformers"):
        tokenthrift.auto._register("some.module")


# Loading and saving


def test_the_automatic_model_is_the_model(saved: tuple[HubModel, Path]) -> None:
    own, folder = saved
    auto, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert auto.config.model_type == f"tokenthrift_{own.system}" == AutoConfig.from_pretrained(folder).model_type
    assert not any(info.values())
    assert not auto.training
    assert auto.model.config == own.config
    expected: dict[str, torch.Tensor] = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    found: dict[str, torch.Tensor] = {**dict(auto.model.named_parameters()), **dict(auto.model.named_buffers())}
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_either_reads_what_the_other_writes(saved: tuple[HubModel, Path], tmp_path: Path) -> None:
    own, folder = saved
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config == own.config
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))
    written = files_of(tmp_path / "again")
    for name, content in files_of(folder).items():
        if name not in ("config.json", "model.safetensors"):
            assert written[name] == content
    again.save_pretrained(tmp_path / "third")
    third, first = files_of(tmp_path / "third"), files_of(folder)
    assert json.loads(third.pop("config.json")) == json.loads(first.pop("config.json"))  # whatever the order of keys
    assert third == first


def test_shards_half_precision_and_places(saved: tuple[HubModel, Path], tmp_path: Path) -> None:
    own, folder = saved
    AutoModel.from_pretrained(folder, dtype="bfloat16").save_pretrained(tmp_path / "sub" / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "sub" / "m").glob("model-*-of-*.safetensors"))) > 1
    model = AutoModel.from_pretrained(tmp_path / "sub", subfolder="m", device_map="auto", dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.hf_device_map == {"": model.device}
    assert all(
        torch.equal(a.bfloat16().float(), b.cpu())
        for a, b in zip(own.parameters(), model.parameters(), strict=True)
        if a.is_floating_point()
    )
    assert AutoModel.from_pretrained(tmp_path / "sub" / "m").dtype == torch.bfloat16  # as it was saved
    assert AutoModel.from_pretrained(folder).dtype == torch.float32


def test_our_own_loader_reads_shards(saved: tuple[HubModel, Path], hub: HubServer, tmp_path: Path) -> None:
    own, folder = saved
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "m", max_shard_size="60KB")
    shards = sorted((tmp_path / "m").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    hub.add("o/shards", files_of(tmp_path / "m"))
    for source in (tmp_path / "m", "o/shards"):
        again = load(source, cache_dir=tmp_path / "cache")
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))
    assert f"in {len(unique_tensors(own))} tensors" in describe(tmp_path / "m")
    assert list_models(tmp_path, cache_dir=tmp_path / "none") == [str(tmp_path / "m")]
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for outside in ("../model.safetensors", "pytorch_model.bin", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], outside)}))
        with pytest.raises(WeightsError, match="other than safetensors"):
            load(tmp_path / "m")
    index.write_text("{}")
    with pytest.raises(WeightsError, match="in which file"):
        load(tmp_path / "m")
    index.write_text(json.dumps(content))
    shards[0].unlink()
    with pytest.raises(OSError, match=shards[0].name):
        load(tmp_path / "m")


def test_what_does_not_fit_raises(saved: tuple[HubModel, Path], tmp_path: Path) -> None:
    own, folder = saved
    files = files_of(folder)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    config = json.loads(files["config.json"])
    (tmp_path / "config.json").write_text(json.dumps({**config, "typo": 1}))
    with pytest.raises(ConfigError, match="typo"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(files["config.json"])
    with pytest.raises(TypeError, match="quantization_config"):
        AutoModel.from_pretrained(tmp_path, quantization_config=object())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)
    other = tiny_karl() if own.system != "karl" else tiny_model("whisper")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="is missing"):
        AutoModel.from_pretrained(tmp_path)


def test_through_the_hub_at_a_revision(models: Any, hub: HubServer, tmp_path: Path) -> None:
    models["karl"].save_pretrained(tmp_path / "m")
    first = hub.add("o/karl", files_of(tmp_path / "m"))
    hub.add("o/karl", {"config.json": b"{}"})
    model = AutoModel.from_pretrained("o/karl", revision=first, cache_dir=tmp_path / "cache")
    assert torch.equal(model.model.to_tokens.weight, models["karl"].to_tokens.weight)
    load("o/karl", revision=first, cache_dir=tmp_path / "cache")
    assert list_models(tmp_path, cache_dir=tmp_path / "cache") == [str(tmp_path / "m"), "o/karl"]
    assert list_models(tmp_path, system="mtsk", cache_dir=tmp_path / "cache") == []


# Use


@pytest.mark.parametrize("system", ["dllm_asr", "mtsk"])
def test_the_speech_pipeline_writes_what_the_model_writes(system: str, models: Any, tmp_path: Path) -> None:
    model = models[system]
    model.save_pretrained(tmp_path)
    recognize = pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")
    assert recognize.type == "seq2seq"
    torch.manual_seed(0)
    audio = [0.1 * torch.randn(n) for n in (16_000, 9_000)]
    texts = [t.text for t in model.transcribe(audio)]
    assert any(texts)
    assert [out["text"].strip() for out in recognize([a.numpy() for a in audio], batch_size=2)] == texts
    assert isinstance(recognize.model, type(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)))
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor([a.numpy() for a in audio], sampling_rate=16_000, return_tensors="pt", padding=True)
    ids = recognize.model.generate(**inputs)
    assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == texts
    assert recognize.model.generate(**inputs, max_new_tokens=1).shape[1] <= max(ids.shape[1], 1)
    with pytest.raises(ValueError, match="divide those of 16 bits by 32768"):
        recognize((32767 * audio[0].clamp(-1, 1)).short().numpy())
    assert recognize.model.plan([ItemSize(seconds=1.0)])[0].native > 0


def test_karl_is_an_autoencoder(models: Any, tmp_path: Path) -> None:
    models["karl"].save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    size = models["karl"].config.size
    image = torch.randint(0, 255, (3, 50, 40), dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, *size)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    tokens = model.encode(pixels, budget=4)
    assert tokens.usage[0].used <= 4
    assert torch.equal(model(pixels, budget=4), model.decode(tokens))


def test_a_clip_goes_through_the_processor_into_the_model(tmp_path: Path) -> None:
    own = tiny_answerer()
    own.save_pretrained(tmp_path / "m")
    model = AutoModel.from_pretrained(tmp_path / "m", dtype="float32", device_map="cpu")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "video_preprocessor_config.json").is_file()
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    frames = torch.randint(0, 255, (20, 3, 50, 40), dtype=torch.uint8)
    clips = processor([frames], return_tensors="pt")["pixel_values_videos"]
    assert clips.shape[1:3] == (own.config.num_frames, 3)
    assert torch.equal(model.encode(clips).embeddings, own.encode(clips).embeddings)
    assert model.plan([ItemSize(frames=20)], 4)[0].used <= 4


def test_vqtoken_and_the_language_model_over_all_media_are_known_too(tmp_path: Path) -> None:
    VQToken().save_pretrained(tmp_path / "vqtoken")
    reducer = AutoModel.from_pretrained(tmp_path / "vqtoken")
    assert reducer.model.config == load(tmp_path / "vqtoken").config
    own = tiny_multimodal()
    own.save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "tokenthrift_multimodal_lm"
    saved = dict(unique_tensors(own))
    assert all(torch.equal(saved[name], tensor) for name, tensor in unique_tensors(model.model).items())
    tokens = AutoProcessor.from_pretrained(tmp_path / "model")("which is red")
    assert tokens["input_ids"] == own.tokenizer.encode("which is red").ids
