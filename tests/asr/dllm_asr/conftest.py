"""Tiny models in double precision, shared by the tests of a module."""

from __future__ import annotations

from typing import get_args

import pytest

from tests.asr.tiny_dllm import Family, tiny_model
from tokenthrift.dllm_asr import DllmAsr

FAMILIES: tuple[Family, ...] = get_args(Family)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> DllmAsr:
    # In double precision, as random weights can make much of the last digit of a float.
    return tiny_model(request.param).double()


@pytest.fixture(scope="module")
def whisper() -> DllmAsr:
    return tiny_model("whisper").double()
