"""MultimodalLM: one window over media, transformers' own `generate`, and files that hold what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.asr.tiny_dllm import speech
from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.hub_server import HubServer
from tests.multimodal.tiny_hub import files_of
from tests.multimodal.tiny_multimodal import save_language_model, tiny_config, tiny_multimodal, tiny_tokenizer
from tests.tokenizers.karl.tiny_karl import pictures, tiny_karl
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.budget import BudgetError, ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.models import find, load
from tokenthrift.multimodal_lm import Media, MultimodalLM
from tokenthrift.multimodal_lm.config import LanguageModelConfig, PrefixConfig, describe
from tokenthrift.quality import QualityCurve, write_quality
from tokenthrift.sources import SourceError, WeightsError, beside
from tokenthrift.vqtoken.video_lm.prefix import VideoPrefix

PICTURES = list(pictures(3))
PROMPTS: list[list[str | Media]] = [
    ["Picture:", Media("image", PICTURES[0]), "Question: which is it? Answer:"],
    ["Sound:", Media("audio", speech(0.7, seed=1)), "which"],
    [Media("image", PICTURES[1]), Media("audio", speech(1.2, seed=2)), Media("image", PICTURES[2]), "a b"],
    ["Question: which is it?"],
]


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return tiny_multimodal()


def generated(model: Any, prompts: Sequence[Any], budget: Any = 4, **settings: Any) -> Tensor:
    end = {"eos_token_id": None, "pad_token_id": 0}
    out: Tensor = model.lm.generate(
        **model.inputs(prompts, budget), max_new_tokens=5, **({"do_sample": False} | end | settings)
    )
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate_of_transformers_works_as_ever(model: MultimodalLM, settings: dict[str, Any]) -> None:
    """A batch gives what each prompt gives alone: greedy, beams, without a cache, several texts a prompt."""
    together = generated(model, PROMPTS, **settings)
    each = settings.get("num_return_sequences", 1)
    for i, prompt in enumerate(PROMPTS):
        assert together[i * each : (i + 1) * each].tolist() == generated(model, [prompt], **settings).tolist()
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_sampling_follows_the_seed_and_reads_the_media(model: MultimodalLM) -> None:
    def draw(budget: Any) -> list[list[int]]:
        torch.manual_seed(5)
        found: list[list[int]] = generated(model, PROMPTS, budget, do_sample=True, top_k=10).tolist()
        return found

    assert draw(4) == draw(4)
    assert draw(4) != draw(1)


def test_one_total_covers_text_media_and_answer(model: MultimodalLM) -> None:
    prepared = model.prepare(PROMPTS[:3], total=30, answer=4)
    assert all(len(row) <= 26 for row in prepared.rows)
    assert [len(usage) for usage in prepared.usage] == [1, 1, 3]
    assert len(prepared.rows[2]) == 26  # native 12 + 60 + 12 and two words: all of the room is used
    sizes = ["a b", Media("image", ItemSize()), Media("audio", ItemSize(seconds=1.2))]
    plan = model.window(sizes, 20)
    assert plan.used == 20
    assert plan.native == 2 + 12 + 60
    with pytest.raises(BudgetError, match="least that its items need"):
        model.prepare(PROMPTS[:1], total=8)
    with pytest.raises(ValueError, match="not both"):
        model.prepare(PROMPTS, 4, total=9)


def test_budgets_by_kind_by_prompt_and_for_all(model: MultimodalLM) -> None:
    used = [[u.used for u in row] for row in model.prepare(PROMPTS, {"image": 3, "audio": "25%"}).usage]
    assert used == [[3], [8], [3, 15, 3], []]
    used = [[u.used for u in row] for row in model.prepare(PROMPTS, [2, {"audio": 5}, None, None]).usage]
    assert used == [[2], [5], [12, 60, 12], []]
    with pytest.raises(ValueError, match="4 prompts but 2 budgets"):
        model.prepare(PROMPTS, [1, 2])
    with pytest.raises(ValueError, match="reads image, audio, not video"):
        model.prepare([[Media("video", PICTURES[0])]])
    with pytest.raises(ValueError, match="at least a word"):
        model.prepare([[]])


def test_answers_say_what_they_used_and_encoded_media_are_not_encoded_again(model: MultimodalLM) -> None:
    answers = model.answer(PROMPTS, 4, max_new_tokens=6)
    assert [[u.used for u in a.usage] for a in answers] == [[4], [4], [4, 4, 4], []]
    native = model.encode(PROMPTS[:1])[0][1]
    again: list[str | Media] = [PROMPTS[0][0], Media("image", native), PROMPTS[0][2]]
    assert model.answer([again], 4, max_new_tokens=6)[0] == answers[0]


def test_the_loss_of_a_batch_is_the_mean_and_reaches_what_is_trained() -> None:
    model = tiny_multimodal()
    words = ["red", "loud", "a b", "c"]
    rows = model.prepare(PROMPTS, 4).rows
    loss = model.loss(rows, words)
    counts = [2, 2, 3, 2]
    alone = [float(model.loss([row], [word]).detach()) * n for row, word, n in zip(rows, words, counts, strict=True)]
    assert float(loss.detach()) == pytest.approx(sum(alone) / sum(counts), abs=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("projectors."):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.abs().sum() > 0), name
        else:
            assert parameter.grad is None, name


def test_a_folder_holds_projectors_and_adapters_only(tmp_path: Path) -> None:
    save_language_model(tmp_path / "llm")
    tiny_karl().save_pretrained(tmp_path / "karl")
    tiny_dllm().save_pretrained(tmp_path / "dllm")
    model = tiny_multimodal(source="../llm")
    model.save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert all("lora_" in name or name.startswith("projectors.") for name in names)
    assert any("lora_" in name for name in names)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, MultimodalLM)
    other = MultimodalLM.from_pretrained(tmp_path / "model", language_model=tmp_path / "llm")
    # The systems beside the model are found by their names; the weights of the language model are those of its source.
    assert loaded.answer(PROMPTS, 3) == other.answer(PROMPTS, 3)
    half = MultimodalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert half.weight.dtype == torch.bfloat16
    assert half.lm.model.rotary_emb.inv_freq.dtype == torch.float32
    planner = find(tmp_path / "model").model
    assert isinstance(planner, MultimodalLM)
    assert planner.window([Media("image", ItemSize()), "a"], 5).used == 5
    save_language_model(tmp_path / "wrong", layers=1)
    with pytest.raises(WeightsError, match="is missing"):
        MultimodalLM.from_pretrained(tmp_path / "model", language_model=tmp_path / "wrong")


def test_the_first_layers_of_a_larger_model(tmp_path: Path) -> None:
    save_language_model(tmp_path / "llm", layers=4)
    sizes = describe(tmp_path / "llm", layers=2, licence="apache-2.0")
    assert sizes.config["num_hidden_layers"] == 2
    model = tiny_multimodal(language_model=sizes)
    model.save_pretrained(tmp_path / "model")
    loaded = MultimodalLM.from_pretrained(tmp_path / "model")
    kept = load_file(tmp_path / "llm" / "model.safetensors")
    assert torch.equal(loaded.lm.model.layers[1].mlp.up_proj.weight, kept["model.layers.1.mlp.up_proj.weight"])
    assert len(loaded.lm.model.layers) == 2


def test_a_window_by_value_reads_the_curves_beside_the_model(tmp_path: Path) -> None:
    tiny_multimodal().save_pretrained(tmp_path)
    write_quality(
        tmp_path,
        [
            QualityCurve(tokens=(0, 2), quality=(0.1, 0.9), kind="image"),
            QualityCurve(tokens=(0, 60), quality=(0.1, 0.9), kind="audio"),
        ],
    )
    model = MultimodalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no prefix of kind video and width 40"):
        model.use_prefix(VideoPrefix(tiny_answerer()))
    model.use_prefix(tiny_multimodal().prefix("image"))
    model.use_prefix(tiny_multimodal().prefix("audio"))
    prompt = [Media("image", ItemSize()), Media("audio", ItemSize(seconds=1.2))]
    used = [planned.usage.used for planned in model.window(prompt, 22, split="value").items]
    assert used == [2, 20]


def test_configurations_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="model_type"):
        LanguageModelConfig(config={})
    with pytest.raises(ConfigError, match="prefixes are of kind"):
        tiny_config(prefixes={"smell": PrefixConfig(source="x", token_size=3)})
    assert tiny_tokenizer().encode("Picture: red").ids == [2, 7, 12]


def test_systems_beside_a_model_are_those_of_the_same_owner_on_the_hub(tmp_path: Path, hub: HubServer) -> None:
    tiny_multimodal().save_pretrained(tmp_path / "model")
    tiny_karl().save_pretrained(tmp_path / "made" / "karl")
    tiny_dllm().save_pretrained(tmp_path / "made" / "dllm")
    hub.add("me/model", files_of(tmp_path / "model"))
    hub.add("me/karl", files_of(tmp_path / "made" / "karl"))
    pulled = MultimodalLM.from_pretrained("me/model", cache_dir=tmp_path / "cache")
    assert pulled.prefix("image").token_size == tiny_karl().config.token_dim
    with pytest.raises(SourceError, match="me/dllm"):
        pulled.prefix("audio")
    assert beside(None, "../karl") == "../karl"
    assert beside(tmp_path / "made" / "to-be", "../karl") == str(tmp_path / "made" / "karl")
    assert beside(tmp_path / "made", "owner/name") == "owner/name"
