"""The head of the draft: which of its positions belong to a recording, and what cannot be written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.draft import CHARACTERS, DraftHead, character_ids, ctc_log_likelihood, ctc_loss


def test_a_position_of_two_frames_counts_for_one_frame_too() -> None:
    torch.manual_seed(0)
    config = DraftConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    head, masks = DraftHead(config, 8).eval(), []

    def note(layer: Any, arguments: tuple[Any, ...]) -> None:
        masks.append(arguments[1])

    head.layers[0].register_forward_pre_hook(note)
    with torch.no_grad():
        assert head(torch.randn(1, 9, 8), torch.tensor([9])).shape == (1, 9, len(CHARACTERS) + 1)
        head(torch.randn(2, 9, 8), torch.tensor([9, 3]))
    assert masks[0] is None
    assert masks[1].flatten(1).sum(1).tolist() == [5, 2]


def test_a_text_longer_than_its_recording_costs_nothing_and_is_impossible() -> None:
    log_p = torch.zeros(2, len(CHARACTERS) + 1).log_softmax(-1)
    loss = ctc_loss(log_p[None], torch.tensor([2]), [character_ids("too long")])
    assert loss == 0.0
    assert ctc_log_likelihood(log_p, "too long") == -math.inf


@pytest.mark.parametrize("text", ["", "é", "A"])
def test_a_text_of_other_characters_is_impossible(text: str) -> None:
    assert ctc_log_likelihood(torch.zeros(4, len(CHARACTERS) + 1).log_softmax(-1), text) == -math.inf


def test_the_likelihood_of_one_letter_sums_over_where_it_may_stand() -> None:
    log_p = torch.zeros(2, len(CHARACTERS) + 1).log_softmax(-1)
    ways = 3  # first, second, or both frames
    expected = math.log(ways / (len(CHARACTERS) + 1) ** 2)
    assert ctc_log_likelihood(log_p, "a") == pytest.approx(expected, abs=1e-5)
