"""The autoregressive baseline: its cache changes nothing, a batch changes nothing, and it learns what it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from tests.asr.tiny_dllm import WIDTH, tiny_config, tiny_model, vocabulary, write_whisper
from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of, greedy, next_token_loss
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.pretrained import assemble

POSITIONS = 24
TEXTS = ["the lazy dog", "over", "", "jumps over the lazy dog", "a fox"]


def baseline() -> AutoregressiveDecoder:
    """Random weights, which never end a text."""
    config = tiny_config("whisper")
    config = replace(config, backbone=replace(config.backbone, max_position_embeddings=POSITIONS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoregressiveDecoder(config, vocabulary())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def ids_of(texts: list[str]) -> list[list[int]]:
    return [[t for w in text.split() for t in vocabulary().word(w)] for text in texts]


@pytest.fixture(scope="module")
def trained() -> AutoregressiveDecoder:
    """Has learnt one text for each recording of `memory`, each of another length."""
    model = baseline()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        next_token_loss(model.decoder, *memory(), ids_of(TEXTS), vocabulary()).backward()
        optimizer.step()
    return model


def memory() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([12, 5, 9, 20, 2])
    states = torch.randn(5, 20, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    mask = torch.arange(20) < lengths[:, None]
    return states.masked_fill(~mask[..., None], torch.nan), mask


@torch.no_grad()
def uncached(decoder: WhisperDecoder, states: Tensor, mask: Tensor) -> list[int]:
    """Greedy tokens of one recording, every step from the beginning."""
    vocab, context = vocabulary(), decoder.context(states, mask)
    ids = [vocab.start_id]
    while len(ids) <= decoder.embed_positions.num_embeddings:
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        hidden, _ = decoder(torch.tensor([ids]), causal, context)
        logits = decoder.logits(hidden[0, -1])
        logits[[vocab.mask_id, vocab.start_id, vocab.delete_id]] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == vocab.eos_id:
            return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize("ends", [False, True])
def test_cache_and_company_change_nothing(trained: AutoregressiveDecoder, ends: bool) -> None:
    model, (states, mask) = trained if ends else baseline(), memory()
    rows = greedy(model.decoder, states, mask, vocabulary())
    assert (len({len(row) for row in rows}) > 3) == ends
    for row, n in enumerate(mask.sum(1).tolist()):
        one = states[row : row + 1, :n], mask[row : row + 1, :n]
        assert rows[row] == uncached(model.decoder, *one)
        assert [rows[row]] == greedy(model.decoder, *one, vocabulary())


def test_what_has_been_learnt_is_written(trained: AutoregressiveDecoder) -> None:
    expected = [(text, len(ids) + 1) for text, ids in zip(TEXTS, ids_of(TEXTS), strict=True)]
    assert trained.decode(*memory()) == expected


def test_a_text_that_never_ends_is_cut_at_the_positions() -> None:
    rows = greedy(baseline().decoder, *memory(), vocabulary())
    assert {len(row) for row in rows} == {POSITIONS}
    special = {vocabulary().mask_id, vocabulary().start_id, vocabulary().delete_id, vocabulary().eos_id}
    assert not special & {token for row in rows for token in row}


def test_greedy_equals_transformers(tmp_path: Path) -> None:
    """The same words as a greedy loop over the reference, told to write only what the cut vocabulary has."""
    folder = write_whisper(tmp_path)
    adapter = AdapterConfig(stride=1)
    model = assemble(str(folder), None, vocab_size=10_000, max_position_embeddings=20, adapter=adapter)
    reference = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    decoder, vocab = decoder_of(model), model.vocabulary
    states, mask = memory()
    states, mask = states[:1, :9].float(), mask[:1, :9]
    (ours,) = greedy(decoder, states, mask, vocab)
    begin = reference.config.decoder_start_token_id + 1  # <|notimestamps|>
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    kept = {whole.token_to_id(str(vocab.tokenizer.id_to_token(i))) for i in range(vocab.size - 4)}
    end = whole.token_to_id("<|endoftext|>")
    banned = [i for i in range(whole.get_vocab_size()) if i not in kept and i != end]
    ids = torch.tensor([[begin]])
    for _ in range(20):
        with torch.no_grad():
            logits = reference(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids).logits[0, -1]
        logits[banned] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        if int(ids[0, -1]) == end:
            break
    theirs = [i for i in ids[0, 1:].tolist() if i != end]
    assert vocab.text(ours) == whole.decode(theirs).strip()
    assert len(ours) == len(theirs) > 0


def test_the_loss_is_the_mean_over_tokens_and_ends() -> None:
    model, vocab, (states, mask) = baseline(), vocabulary(), memory()
    states, mask, texts = states[:2], mask[:2], [[5, 6, 7], [8]]
    with torch.no_grad():
        both = next_token_loss(model.decoder, states, mask, texts, vocab)
        expected = []
        for row, text in enumerate(texts):
            context = model.decoder.context(states[row : row + 1], mask[row : row + 1])
            for i, token in enumerate([*text, vocab.eos_id]):
                causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()
                hidden, _ = model.decoder(torch.tensor([[vocab.start_id, *text[:i]]]), causal, context)
                expected.append(-model.decoder.logits(hidden[0, -1]).log_softmax(-1)[token].item())
    assert both.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = baseline().float()
    model.save_pretrained(tmp_path)
    loaded = AutoregressiveDecoder.from_pretrained(tmp_path)
    assert loaded.config == model.config
    states, mask = memory()
    assert loaded.decode(states.float(), mask) == model.decode(states.float(), mask)


def test_only_whisper_has_a_decoder() -> None:
    with pytest.raises(TypeError, match="made of Whisper's decoder; leave language_model out"):
        decoder_of(tiny_model("bert"))
