"""Whisper's decoder written as a Llama: the same scores, and sound that no layer changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.recipes.test_mtsk_recipes import script
from tokenthrift.backbones.whisper_decoder import WhisperDecoder

whisper_llama = script("whisper_llama")
SIZE, HEADS, LAYERS, POSITIONS, WORDS, SOUNDS = 40, 2, 2, 48, 40, 25
BEGIN = (WORDS - 2, WORDS - 1)


@pytest.fixture(scope="module")
def decoder() -> WhisperDecoder:
    """Random weights, those of the norms too. Embeddings have a small mean, as trained ones do."""
    torch.manual_seed(0)
    made = WhisperDecoder(WORDS, SIZE, LAYERS, HEADS, 2 * POSITIONS, POSITIONS).eval()
    for name, weight in made.named_parameters():
        one = 1.0 if "norm.weight" in name else 0.0
        weight.data = one + torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.2)
    made.embed_tokens.weight.data -= 0.9 * made.embed_tokens.weight.data.mean(1, keepdim=True)
    return made


@torch.no_grad()
def scores(decoder: WhisperDecoder, sound: Tensor, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Scores (L, words) of what follows each token, and the hidden states before each norm of sound and the last."""
    layers: Any = decoder.layers
    norms = [layer.encoder_attn_layer_norm for layer in layers] + [decoder.layer_norm]
    seen: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for norm in norms]
    context = decoder.context(sound[None], torch.ones(1, len(sound), dtype=torch.bool))
    hidden, _ = decoder(torch.tensor([ids]), torch.ones(len(ids), len(ids), dtype=torch.bool).tril(), context)
    for hook in hooks:
        hook.remove()
    return decoder.logits(hidden)[0], seen


def llama(decoder: WhisperDecoder, sound: Tensor) -> tuple[LlamaForCausalLM, Tensor]:
    """The Llama of a decoder, with the words in their order but for those before a text, and what begins a text."""
    _, seen = scores(decoder, sound, [*BEGIN, *range(20)])
    rms = [float(x.square().mean(-1).sqrt().max()) * 1.5 for x in seen[:-1]]
    usual = float(seen[-1].square().mean(-1).sqrt().median())
    norm = float(sound.norm(dim=1).mean())
    model, first = whisper_llama.llama_of(decoder.state_dict(), HEADS, range(WORDS - 2), BEGIN, 2, norm, [*rms, usual])
    return model, first


def embeddings(model: LlamaForCausalLM, first: Tensor, sound: Tensor, ids: list[int]) -> Tensor:
    """(1, N, H): the sink, sound, the two tokens before a text, words."""
    extra = torch.zeros(len(sound), whisper_llama.EXTRA)
    extra[:, whisper_llama.SOUND] = whisper_llama.BALLAST
    table: Tensor = model.get_input_embeddings().weight
    sink, second = table[WORDS - 2][None], table[WORDS][None]
    return torch.cat([sink, torch.cat([sound, extra], 1), first[None], second, table[ids]])[None]


@pytest.mark.parametrize("half", [False, True])
def test_the_llama_writes_what_the_decoder_writes(decoder: WhisperDecoder, half: bool) -> None:
    sound = torch.randn(SOUNDS, SIZE) * 2
    model, first = llama(decoder, sound)
    if half:  # as weights are kept
        model = model.half().float()
    ids = torch.randint(0, WORDS - 2, (POSITIONS - 2,)).tolist()
    with torch.no_grad():
        found = (
            model(inputs_embeds=embeddings(model, first, sound, ids))
            .logits[0, -POSITIONS + 1 :, : WORDS - 2]
            .log_softmax(-1)
        )
        expected = scores(decoder, sound, [*BEGIN, *ids])[0][1:, : WORDS - 2].log_softmax(-1)
        other = scores(decoder, sound.flip(0)[:5], [*BEGIN, *ids])[0][1:, : WORDS - 2].log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 0.02 * (expected.exp() * (expected - other)).sum(-1).mean()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_sound_stays_as_it_came_and_text_sees_all_of_it(decoder: WhisperDecoder) -> None:
    sound = torch.randn(SOUNDS, SIZE)
    model, first = llama(decoder, sound)
    given = embeddings(model, first, sound, [1, 2, 3])
    with torch.no_grad():
        states = model(inputs_embeds=given, output_hidden_states=True).hidden_states
        before = slice(0, SOUNDS + 1)
        for state in states[:-1]:  # the last is behind the norm
            assert torch.allclose(state[:, before], given[:, before], atol=1e-4)
        changed = given.clone()
        changed[0, SOUNDS, :SIZE] += 1.0
        before_it, after_it = (model(inputs_embeds=x).logits[0, -4:] for x in (given, changed))
    assert not torch.allclose(before_it, after_it, atol=1e-3)


def test_positions_are_counted_from_the_start_of_the_text(decoder: WhisperDecoder) -> None:
    """However much sound is before it, a word has the position that it had."""
    sound = torch.randn(3, SIZE)
    model, first = llama(decoder, sound)
    ids = [4] * (POSITIONS - 2)
    with torch.no_grad():
        once, again = (
            model(inputs_embeds=embeddings(model, first, sound.repeat(n, 1), ids)).logits[
                0, -POSITIONS + 1 :, : WORDS - 2
            ]
            for n in (1, 9)
        )
    assert torch.allclose(once, again, atol=1e-2)
    assert (once[:-1] - once[1:]).abs().amax(1).min() > 0.05, "equal words differ by their positions alone"


def test_what_cannot_be_written_is_refused(decoder: WhisperDecoder) -> None:
    state = decoder.state_dict() | {"embed_positions.weight": torch.zeros(49, SIZE)}
    with pytest.raises(ValueError, match="too few for 49 positions"):
        whisper_llama.llama_of(state, HEADS, range(9), (9, 10), 1, 1.0, [1.0] * (LAYERS + 1))
    with pytest.raises(ValueError, match="7 heads do not divide 46"):
        whisper_llama.llama_of(decoder.state_dict(), 7, range(9), (9, 10), 1, 1.0, [1.0] * (LAYERS + 1))
