"""Prefix backbones: rows stay apart, every slot sees both ways, and vocabularies can be cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertModel, PreTrainedModel

from tokenthrift.backbones.llada import llama_from_llada
from tokenthrift.backbones.prefix import PrefixBackbone, language_model, pack, trim_vocabulary

VOCAB, WIDTH, MASK = 40, 32, 39
COMMON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 2, "max_position_embeddings": 48},
    "modernbert": {"num_hidden_layers": 3, "max_position_embeddings": 48, "local_attention": 6},
    "llama": {"num_hidden_layers": 2, "max_position_embeddings": 48, "num_key_value_heads": 2},
    "qwen3": {"num_hidden_layers": 2, "max_position_embeddings": 48, "num_key_value_heads": 2, "head_dim": 8},
}
FAMILIES = sorted(CONFIGS)


def small_model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = language_model({"model_type": family, **COMMON, **CONFIGS[family]})
        for parameter in lm.parameters():
            # Fresh weights are so small that attention would hardly matter.
            torch.nn.init.normal_(parameter, std=0.2)
    lm.train(False)
    return lm


def tables(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The weights of the input embedding and of the output projection."""
    model: Any = lm
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def rows(lengths: list[int], slots: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory with NaN in its padding, its mask, response ids and their mask."""
    generator = torch.Generator().manual_seed(seed)
    memory_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    memory = torch.randn(len(lengths), max(lengths), WIDTH, generator=generator)
    mask = torch.arange(max(slots)) < torch.tensor(slots)[:, None]
    ids = torch.randint(0, VOCAB, mask.shape, generator=generator)
    return memory.masked_fill(~memory_mask.unsqueeze(-1), torch.nan), memory_mask, ids, mask


def predict(backbone: PrefixBackbone, memory: Tensor, memory_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = backbone(ids, mask, backbone.context(memory, memory_mask))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [[], [5, 6]])
def test_a_row_of_a_batch_equals_the_row_alone(family: str, prompt: list[int]) -> None:
    backbone = PrefixBackbone(small_model(family), MASK, prompt=prompt)
    lengths, slots = [9, 3, 0, 6], [4, 12, 5, 1]
    batch = rows(lengths, slots)
    together = predict(backbone, *batch)
    assert not together.isnan().any()
    for row, (n, s) in enumerate(zip(lengths, slots, strict=True)):
        one = slice(row, row + 1)
        memory, memory_mask, ids, mask = (tensor[one] for tensor in batch)
        alone = predict(backbone, memory[:, :n], memory_mask[:, :n], ids[:, :s], mask[:, :s])
        torch.testing.assert_close(together[one, :s], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_notice_more_padding(family: str) -> None:
    backbone = PrefixBackbone(small_model(family), MASK)
    memory, memory_mask, ids, mask = rows([5, 3], [4, 6])
    plain = predict(backbone, memory, memory_mask, ids, mask)
    memory = torch.cat([memory, torch.full((2, 7, WIDTH), torch.nan)], 1)
    memory_mask = torch.cat([memory_mask, torch.zeros(2, 7, dtype=torch.bool)], 1)
    padded = predict(backbone, memory, memory_mask, ids.masked_fill(~mask, 11), mask)
    torch.testing.assert_close(padded[mask], plain[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shorter_neighbour", [False, True])
def test_every_slot_sees_both_ways(family: str, shorter_neighbour: bool) -> None:
    # Without padding the attention layers get no mask from elsewhere: a decoder must not turn causal then.
    count = 2 if shorter_neighbour else 1
    memory, memory_mask, ids, mask = rows([5, 3][:count], [6, 2][:count])
    backbone = PrefixBackbone(small_model(family), MASK)
    plain = predict(backbone, memory, memory_mask, ids, mask)[0, :, :MASK]
    for slot in (0, 5):
        other = ids.clone()
        other[0, slot] = (other[0, slot] + 1) % MASK
        moved = (predict(backbone, memory, memory_mask, other, mask)[0, :, :MASK] - plain).abs().amax(-1)
        assert (moved > 1e-4).all(), f"changing slot {slot} moved the slots by {moved.tolist()}"
    memory[0, 4, 0] += 3.0
    assert ((predict(backbone, memory, memory_mask, ids, mask)[0, :, :MASK] - plain).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_model_at_the_response_slots(family: str) -> None:
    lm = small_model(family)
    ids = torch.randint(0, MASK, (1, 14), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"attention_mask": torch.ones(1, 1, 14, 14, dtype=torch.bool)}
    if family in ("bert", "modernbert"):
        settings = {}
    with torch.no_grad():
        model: Any = lm
        expected = model(input_ids=ids, **settings).logits
        memory = model.get_input_embeddings()(ids[:, :5])
    seen = torch.ones(1, 5, dtype=torch.bool)
    response = ids[:, 7:], torch.ones(1, 7, dtype=torch.bool)
    prompt = ids[0, 5:7].tolist()
    ours = predict(PrefixBackbone(lm, MASK, prompt=prompt), memory, seen, *response)
    torch.testing.assert_close(ours[..., :MASK], expected[:, 7:, :MASK], rtol=0, atol=1e-5)
    assert (ours[..., MASK] == -torch.inf).all()
    shifted = predict(PrefixBackbone(lm, MASK, prompt=prompt, shifted=True), memory, seen, *response)
    torch.testing.assert_close(shifted[..., :MASK], expected[:, 6:13, :MASK], rtol=0, atol=1e-5)


def test_a_shifted_model_without_prefix_reads_its_first_slot_in_place() -> None:
    lm = small_model("llama")
    _, _, ids, mask = rows([1], [6])
    nothing = torch.zeros(1, 0, WIDTH), torch.zeros(1, 0, dtype=torch.bool)
    plain = predict(PrefixBackbone(lm, MASK), *nothing, ids, mask)
    shifted = predict(PrefixBackbone(lm, MASK, shifted=True), *nothing, ids, mask)
    torch.testing.assert_close(shifted, torch.cat([plain[:, :1], plain[:, :-1]], 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_rows_of_the_context_selects_rows_of_the_logits(family: str) -> None:
    backbone = PrefixBackbone(small_model(family), MASK, prompt=[3])
    memory, memory_mask, ids, mask = rows([4, 9, 2], [5, 3, 7])
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        context = backbone.context(memory, memory_mask)
        part = backbone(ids[chosen], mask[chosen], context.select(chosen))
        whole = backbone(ids, mask, context)
    torch.testing.assert_close(part[mask[chosen]], whole[chosen][mask[chosen]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter_and_the_memory_but_not_the_padding(family: str) -> None:
    lm = small_model(family)
    backbone = PrefixBackbone(lm, MASK, prompt=[3])
    memory, memory_mask, ids, mask = rows([4, 7], [5, 3])
    memory = memory.requires_grad_()
    logits = backbone(ids, mask, backbone.context(memory, memory_mask))
    torch.autograd.backward(logits[mask][:, :MASK].square().mean())
    assert memory.grad is not None
    assert (memory.grad[memory_mask].abs().amax(-1) > 0).all()
    assert (memory.grad[~memory_mask] == 0).all()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_a_row_with_nothing_in_it_spoils_no_gradient() -> None:
    for family in FAMILIES:
        lm = small_model(family)
        backbone = PrefixBackbone(lm, MASK)
        memory, memory_mask, ids, mask = rows([4, 0], [5, 0])
        logits = backbone(ids, mask, backbone.context(memory, memory_mask))
        torch.autograd.backward(logits[mask][:, :MASK].sum())
        for parameter in lm.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()


def test_errors_say_what_is_wrong() -> None:
    lm = small_model("bert")
    with pytest.raises(ValueError, match=r"0\.\.39"):
        PrefixBackbone(lm, 40)
    with pytest.raises(ValueError, match="gpt2"):
        language_model({"model_type": "gpt2"})
    backbone = PrefixBackbone(lm, MASK)
    with pytest.raises(ValueError, match=r"49 positions, the model has 48"):
        predict(backbone, *rows([40], [9]))
    lm.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        PrefixBackbone(lm, MASK)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pack_keeps_what_exists_in_order(mask: list[list[bool]]) -> None:
    seen = torch.tensor(mask)
    states = torch.arange(seen.numel(), dtype=torch.float32).reshape(*seen.shape, 1)
    packed, packed_mask = pack(states, seen)
    assert packed.shape[1] == max(map(sum, mask))
    for row in range(len(mask)):
        count = sum(mask[row])
        assert packed_mask[row].tolist() == [i < count for i in range(packed.shape[1])]
        assert torch.equal(packed[row, :count], states[row][seen[row]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_vocabulary_keeps_its_tokens_and_appends_their_mean(family: str) -> None:
    lm = small_model(family)
    keep = [7, 2, 30, 11]
    small = trim_vocabulary(lm, keep, extra=2)
    (old, old_output), (new, new_output) = tables(lm), tables(small)
    torch.testing.assert_close(new[:4], old[keep])
    torch.testing.assert_close(new[4:], old[keep].mean(0).expand(2, -1))
    assert (new_output is new) == (old_output is old)
    assert small.config.vocab_size == 6
    assert lm.config.vocab_size == VOCAB
    assert not small.training
    memory, memory_mask, ids, mask = rows([4], [5])
    ids = ids % 4
    trimmed = predict(PrefixBackbone(small, 5), memory, memory_mask, ids, mask)
    whole = predict(PrefixBackbone(lm, MASK), memory, memory_mask, torch.tensor(keep)[ids], mask)
    torch.testing.assert_close(trimmed[..., :4], whole[..., keep], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_embedding_row_can_be_trained(family: str) -> None:
    # transformers freezes the row of pad_token_id, which would be the one of EOS in LLaDA.
    lm = language_model({"model_type": family, **COMMON, **CONFIGS[family], "pad_token_id": 7})
    embedding: Any = lm.get_input_embeddings()
    assert embedding.padding_idx is None


def test_pretrained_weights_come_from_a_folder(tmp_path: Path) -> None:
    lm = small_model("bert")
    lm.save_pretrained(tmp_path / "masked")
    again = language_model(tmp_path / "masked")
    batch = rows([4, 7], [5, 3])
    expected = predict(PrefixBackbone(lm, MASK), *batch)
    assert torch.equal(predict(PrefixBackbone(again, MASK), *batch), expected)

    # A sentence encoder has no head of its own; its embeddings serve as one.
    bare: Any = lm
    assert isinstance(bare.bert, BertModel)
    bare.bert.save_pretrained(tmp_path / "encoder")
    headless = language_model(str(tmp_path / "encoder"))
    embedding, output = tables(headless)
    assert torch.equal(embedding, tables(lm)[0])
    assert output is embedding
    # A head without one of its tensors is damaged.
    state = load_file(tmp_path / "masked" / "model.safetensors")
    del state["cls.predictions.transform.dense.weight"]
    save_file(state, tmp_path / "masked" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"transform\.dense\.weight"):
        language_model(tmp_path / "masked")


def test_llada_weights_through_the_llama_backbone(reference: Path) -> None:
    folder = reference / "dllm"
    config = json.loads((folder / "tiny_llada.json").read_text())["config"]
    arrays = {name: torch.from_numpy(array) for name, array in np.load(folder / "tiny_llada.npz").items()}
    mask_id = config["mask_token_id"]
    backbone = PrefixBackbone(llama_from_llada(config, load_file(folder / "tiny_llada.safetensors")), mask_id)
    ids, seen = arrays["ids"], arrays["attention_mask"].bool()

    def decode(ids: Tensor, mask: Tensor) -> Tensor:
        nothing = torch.zeros(len(ids), 0, 64), torch.zeros(len(ids), 0, dtype=torch.bool)
        return predict(backbone, *nothing, ids, mask)[..., :mask_id]

    free = decode(ids, torch.ones_like(seen))
    torch.testing.assert_close(free, arrays["logits"][..., :mask_id], rtol=0, atol=1e-4)
    # The reference pads on the left; rotary positions are relative, so a row moved to the front says the same.
    right = torch.arange(ids.shape[1]) < seen.sum(1, keepdim=True)
    moved = torch.zeros_like(ids)
    moved[right] = ids[seen]
    honoured = decode(moved, right)
    torch.testing.assert_close(honoured[right], arrays["logits_masked_honoured"][seen][:, :mask_id], rtol=0, atol=1e-4)


def test_llada_with_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="alibi"):
        llama_from_llada({"alibi": True}, {})
    for switch in ("input_emb_norm", "attention_layer_norm", "clip_qkv"):  # none of them has a tensor to give it away
        with pytest.raises(ValueError, match=switch):
            llama_from_llada({switch: 8.0}, {})
