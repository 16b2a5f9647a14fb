"""The shipped multimodal-tiny answers; transformers' `generate` over it is as ever.

SmolLM2 is a random model of its sizes here; TOKENTHRIFT_SMOLLM2=FOLDER puts the real one in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multimodal.tiny_multimodal import stand_in_for_smollm2
from tokenthrift.multimodal_lm import Media, MultimodalLM

CARD = Path(__file__).resolve().parents[2] / "model_cards" / "multimodal-tiny"


def test_it_answers_and_generate_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_smollm2(monkeypatch)
    model = MultimodalLM.from_pretrained(CARD)
    generator = torch.Generator().manual_seed(0)
    photo, clip = torch.rand(3, 64, 64, generator=generator), torch.rand(8, 3, 64, 64, generator=generator)
    sound = 0.1 * torch.randn(16_000, generator=generator)
    media = [Media("image", photo), Media("video", clip), Media("audio", sound)]
    prompts: list[list[Any]] = [[*media, "Question: what is moving? Answer:"], [media[2], "which digit is said?"]]
    for split in ("value", "equal", "demand"):
        answers = model.answer(prompts, total=48, split=split, max_new_tokens=4)
        assert [len(answer.usage) for answer in answers] == [3, 1]
        assert all(sum(usage.used for usage in answer.usage) < 48 for answer in answers)
    budget = {"image": 4, "video": 4, "audio": 4}
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        options: Any = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
        together = model.lm.generate(**model.inputs(prompts, budget), **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert row.tolist() == model.lm.generate(**model.inputs([prompt], budget), **options)[0].tolist()
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(model.lm.generate(**model.inputs(prompts, budget), max_new_tokens=3, do_sample=True).tolist())
    assert drawn[0] == drawn[1]
