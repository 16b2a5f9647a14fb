"""Eight bits: a row of a linear layer is computed as if it stood alone, and certified text is the one left to right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.asr.tiny_dllm import speech, tiny_model
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.draft import length_guard
from tokenthrift.recognizers.precision import Int8Linear, with_precision

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


def test_without_wide_sums_inputs_have_a_bit_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    whole, small = layer(384, 64, 0, False)
    x = torch.randn(9, 384)
    assert int(small.limits[1, 0] * 2) == 127
    assert (small(x) - whole(x)).norm() < 0.03 * whole(x).norm()


def test_inputs_of_16_bits_leave_only_the_rounding_of_the_weights() -> None:
    errors = []
    for bits in (8, 16):
        _, small = layer(384, 64, 0, False, bits)
        x = torch.randn(50, 384)
        x[:, 0] = 40.0  # beside which all else is small
        exact = x @ small.weight.T
        errors.append(float((small(x) - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 100


def test_int8_texts_do_not_depend_on_the_batch_and_are_the_ones_left_to_right() -> None:
    model = tiny_model("whisper", certify="ar")
    small: Any = with_precision(model, model, "int8")
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    bits = {name: part.input_bits for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    assert {bits.pop("backbone.decoder.projection"), bits["backbone.decoder.layers.0.fc1"]} == {16}
    assert {bits["encoder.layers.0.fc1"], bits["draft.output"]} == {8}
    audio = [speech(0.6 + 0.3 * i, i) for i in range(4)]
    together = small.transcribe(audio)
    for samples, done in zip(audio, together, strict=True):
        assert small.transcribe([samples])[0].text == done.text
        states, lengths = model.encode([samples])
        limit = length_guard(model.drafts(states, lengths)[0], model.vocabulary)
        memory, mask = model.adapter(states, lengths)
        (ids,) = greedy(decoder_of(model), memory, mask, model.vocabulary, [limit])
        assert done.text == model.vocabulary.text(ids)
    assert any(done.text for done in together)


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
def test_language_models_of_transformers_have_eight_bits_too(family: Any) -> None:
    model = tiny_model(family)
    small: Any = with_precision(model, model, "int8")
    assert any(isinstance(module, Int8Linear) for module in model.backbone.modules())
    audio = [speech(0.6 + 0.3 * i, i) for i in range(2)]
    assert [done.text for done in small.transcribe(audio)] == [small.transcribe([one])[0].text for one in audio]


def test_int8_is_for_processors() -> None:
    network = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="for processors"):
        with_precision(None, network, "int8")
