"""The benchmark of decoding costs: its shapes, its two ways of decoding, and where its passes come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.benchmark_scripts import load_benchmark
from tokenthrift.backbones.language_models import language_model


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark("decoding_cost")


def tiny(benchmark: Any, name: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 80}
    return replace(benchmark.SHAPES[name], **sizes)


@pytest.mark.parametrize(
    ("name", "millions"), [("SmolLM2-135M", 134.5), ("Qwen2.5-0.5B", 494.0), ("Qwen2.5-1.5B", 1543.7)]
)
def test_shapes_have_the_published_numbers_of_weights(benchmark: Any, name: str, millions: float) -> None:
    with torch.device("meta"):
        model = language_model(benchmark.SHAPES[name].for_transformers())
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-0.5B"])
@torch.inference_mode()
def test_both_ways_leave_the_cache_as_it_was(benchmark: Any, name: str) -> None:
    """Steps are what the model writes without a cache; a pass sees slots on both sides."""
    torch.manual_seed(0)
    model = benchmark.model_of(tiny(benchmark, name), torch.float32, "cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    cache = benchmark.prefilled(model, 5)
    last = benchmark.left_to_right(model, cache, 4)
    assert cache.get_seq_length() == 5
    ids = torch.tensor([[*range(5), 0]])
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert last.item() == ids[0, -1].item()
    whole = torch.cat([torch.arange(5)[None], torch.zeros(1, 4, dtype=torch.long)], 1)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[5:] = True
    expected = model(input_ids=whole, attention_mask=seen[None, None]).logits[:, 5:].argmax(-1)
    assert torch.equal(benchmark.parallel(model, cache, 4), expected)
    assert cache.get_seq_length() == 5


def test_a_row_of_the_table(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "SmolLM2-135M", tiny(benchmark, "SmolLM2-135M"))
    options = {"dtype": torch.float32, "device": "cpu", "repeats": 1}
    cost = benchmark.measure("SmolLM2-135M", slots=6, prefix=5, passes=2.0, **options)
    assert cost.ratio == pytest.approx(cost.steps / (2 * cost.one_pass))
    assert "| SmolLM2-135M | float32 | cpu | 5 | 6 |" in benchmark.table([cost])


def test_passes_come_from_the_other_benchmark(benchmark: Any, tmp_path: Path) -> None:
    assert benchmark.passes_of("2.5", "any", "any") == 2.5
    rows = [{"system": "diffusion, draft", "set": "strangers", "forwards": 2.25}]
    path = tmp_path / "out.json"
    path.write_text(json.dumps(rows))
    assert benchmark.passes_of(str(path), "diffusion, draft", "strangers") == 2.25
    with pytest.raises(ValueError, match="no row of 'diffusion, draft' on 'lj'"):
        benchmark.passes_of(str(path), "diffusion, draft", "lj")
