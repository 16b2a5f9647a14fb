"""Eight bits: a row of a linear layer is computed as if it stood alone, and certified text is the one left to right."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.asr.tiny_dllm import speech, tiny_model
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.draft import length_guard
from tokenthrift.recognizers.precision import Int8Linear, OneByOne, with_precision

ROOT = Path(__file__).parents[3]
BITS = st.sampled_from([8, 16])


def layer(inputs: int, outputs: int, seed: int, bias: bool, bits: Any = 8) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(seed)
    whole = nn.Linear(inputs, outputs, bias=bias)
    return whole, Int8Linear(whole.weight, whole.bias if bias else None, bits)


@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(0, 99),
    st.booleans(),
    BITS,
    st.floats(-6, 6),
)
def test_a_row_is_computed_as_if_it_stood_alone(
    inputs: int, outputs: int, rows: int, seed: int, bias: bool, bits: int, size: float
) -> None:
    _, small = layer(inputs, outputs, seed, bias, bits)
    x = torch.randn(rows, inputs) * torch.logspace(-size, size, rows)[:, None]
    together = small(x)
    assert together.shape == (rows, outputs)
    for row, one in zip(x, together, strict=True):
        assert torch.equal(small(row), one)


@pytest.mark.parametrize("bits", [8, 16])
def test_eight_bits_are_near_the_layer_whatever_the_size_of_a_row(bits: int) -> None:
    whole, small = layer(384, 64, 0, True, bits)
    for size in (1e-3, 1.0, 1e3):
        for x in (size * torch.randn(3, 5, 384), size * torch.rand(3, 5, 384)):
            exact = whole(x) - whole.bias
            assert (small(x) - whole.bias - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(small(torch.zeros(2, 384)), whole.bias.detach().expand(2, -1))
    assert (small.weight - whole.weight).abs().max() < whole.weight.abs().max() / 200


@pytest.mark.parametrize("engine", [name for name in torch.backends.quantized.supported_engines if name != "none"])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_engine_of_pytorch_computes_rows_alone(engine: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    whole, small = layer(384, 64, 0, True, bits)
    x = torch.randn(9, 384)
    found = copy.deepcopy(small)(x)
    assert (found - whole(x)).norm() < 0.02 * whole(x).norm()
    assert all(torch.equal(small(row), one) for row, one in zip(x, found, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
def test_where_sums_saturate_inputs_have_a_bit_less(bits: int) -> None:
    """Kernels of FBGEMM for processors without VNNI, in a process of its own."""
    script = f"""
        import torch
        from tokenthrift.recognizers.precision import Int8Linear
        torch.backends.quantized.engine = "fbgemm"
        weight, x = torch.rand(64, 384), torch.rand(9, 384)  # all positive: the largest sums
        layer = Int8Linear(weight, None, {bits})
        exact = x @ weight.T
        assert int(2 * layer.limits.max()) == 127
        assert (layer(x) - exact).norm() < 0.002 * exact.norm()
    """
    own = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=own, check=True)


def test_inputs_of_16_bits_leave_only_the_rounding_of_the_weights() -> None:
    errors = []
    for bits in (8, 16):
        _, small = layer(384, 64, 0, False, bits)
        x = torch.randn(50, 384)
        x[:, 0] = 40.0  # beside which all else is small
        exact = x @ small.weight.T
        errors.append(float((small(x) - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 100


def test_certified_int8_texts_are_the_ones_left_to_right_in_a_batch_too() -> None:
    model = tiny_model("whisper", certify="ar")
    assert isinstance(with_precision(model, model, "int8"), OneByOne)
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    bits = {name: part.input_bits for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    assert {bits["backbone.decoder.projection"], bits["backbone.decoder.layers.0.fc1"]} == {16}
    assert {bits["encoder.layers.0.fc1"], bits["draft.output"]} == {8}
    audio = [speech(0.6 + 0.3 * i, i) for i in range(4)]
    for samples, done in zip(audio, model.transcribe(audio), strict=True):
        states, lengths = model.encode([samples])
        limit = length_guard(model.drafts(states, lengths)[0], model.vocabulary)
        memory, mask = model.adapter(states, lengths)
        (ids,) = greedy(decoder_of(model), memory, mask, model.vocabulary, [limit])
        assert done.text == model.vocabulary.text(ids)


def read_twice(model: DllmAsr) -> float:
    """How far apart scores of tokens are that are read together and one by one, as a share of their norm."""
    decoder = decoder_of(model)
    memory = torch.randn(1, 30, decoder.layer_norm.normalized_shape[0])
    context = decoder.context(memory, torch.ones(1, 30, dtype=torch.bool))
    ids, past, rows = torch.randint(0, 100, (1, 40)), None, []
    together = decoder.logits(decoder(ids, torch.ones(40, 40, dtype=torch.bool).tril(), context)[0])
    for token in ids[0]:
        hidden, past = decoder(token[None, None], None, context, past)
        rows.append(decoder.logits(hidden))
    return float((together - torch.cat(rows, 1)).norm() / together.norm())


@torch.inference_mode()
def test_inputs_of_16_bits_keep_what_is_read_together_near_what_is_read_token_by_token() -> None:
    found = {}
    for parts in ((), ("backbone",)):
        model = DllmAsr.from_pretrained(ROOT / "model_cards/dllm-asr-tiny-en").float()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DllmAsr, "certified_parts", parts)
            with_precision(model, model, "int8")
        torch.manual_seed(0)
        found[parts] = max(read_twice(model) for _ in range(4))
    assert found["backbone",] < 5e-4
    assert found[()] > 10 * found["backbone",]


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
@torch.inference_mode()
def test_language_models_of_transformers_have_eight_bits_too(family: Any) -> None:
    model = tiny_model(family)
    torch.manual_seed(0)
    memory, ids = torch.randn(1, 9, model.backbone.memory_size), torch.randint(0, 100, (1, 7))
    scores = []
    for precision in ("float32", "int8"):
        with_precision(model, model, precision)
        seen = torch.ones(1, 9, dtype=torch.bool)
        found = model.backbone(ids, torch.ones(1, 7, dtype=torch.bool), model.backbone.context(memory, seen))
        scores.append(found[found.isfinite()])
    assert any(isinstance(module, Int8Linear) for module in model.backbone.modules())
    assert 0 < (scores[0] - scores[1]).norm() < 0.1 * scores[0].norm()


def test_a_layer_of_several_names_stays_one() -> None:
    network = nn.Module()
    network.one = network.other = nn.Linear(4, 4)
    with_precision(network, network, "int8")
    assert isinstance(network.one, Int8Linear)
    assert network.one is network.other


def test_a_model_in_8_bits_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model("whisper")
    with_precision(model, model, "int8")
    with pytest.raises(RuntimeError, match="for inference"):
        model.save_pretrained(tmp_path / "model")


def test_int8_is_for_processors() -> None:
    network = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="for processors"):
        with_precision(None, network, "int8")
