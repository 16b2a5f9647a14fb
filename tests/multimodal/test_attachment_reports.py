"""What users report of token reduction in live models: each is a test of `attach`.

Placeholders that a model writes itself (verl-project/verl 3469, StarsfieldAI/R1-V 91), prompts cut inside a picture
(MakazhanAlpamys/Soup 488, hiyouga/LlamaFactory 8329), tiles of one picture counted apart, positions left over from the
call before, some logits only, and gradient checkpointing, which patched forwards break.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.multimodal.tiny_families import build, encode, rows_of, shared
from tests.multimodal.tiny_media import AUDIO
from tests.multimodal.tiny_vlms import IMAGE, START, Picture, generated, logits
from tokenthrift.attachment import attach
from tokenthrift.reducers import BipartiteMerging, Uniform

FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "smolvlm", "qwen2_audio"])


def slot(family: str) -> int:
    return AUDIO if family == "qwen2_audio" else IMAGE


@FAMILIES
def test_a_placeholder_that_the_model_writes_is_a_word_and_no_item(family: str) -> None:
    model, inputs = shared(family), encode(family, rows_of(family))

    def write(ids: Any, scores: Any) -> Any:
        first = torch.nn.functional.one_hot(torch.full((len(ids),), slot(family)), scores.shape[1])
        return first.to(scores) if ids.shape[1] == inputs["input_ids"].shape[1] else scores

    free: Any = {"max_new_tokens": 3, "do_sample": False, "logits_processor": [write]}
    expected = model.generate(**inputs, **free)
    assert (expected[:, -3] == slot(family)).all()
    with attach(model, BipartiteMerging()) as handle:
        assert torch.equal(model.generate(**inputs, **free), expected)
        native = handle.usage
    with attach(model, BipartiteMerging(), "50%") as handle:
        assert (model.generate(**inputs, **free)[:, -3] == slot(family)).all()
        assert [u.native for u in handle.usage] == [u.native for u in native]
        assert all(2 * u.used <= u.native for u in handle.usage)


@FAMILIES
def test_a_prompt_cut_inside_an_item_raises_and_the_next_call_is_as_ever(family: str) -> None:
    model, inputs = shared(family), encode(family, [rows_of(family)[1]])
    last = int((inputs["input_ids"][0] == slot(family)).nonzero().max())
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    cut = {name: value[:, :last] if name in names else value for name, value in inputs.items()}
    with attach(model, Uniform(), "50%") as handle:
        before, usage = logits(model, inputs), handle.usage
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            logits(model, cut)
        assert torch.equal(logits(model, inputs), before)
        assert handle.usage == usage


@FAMILIES
def test_a_text_after_a_call_with_media_is_read_as_by_the_bare_model(family: str) -> None:
    model, inputs = build(family), encode(family, rows_of(family))
    text = {"input_ids": torch.tensor([[10, 11, 12, 13]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = logits(model, text), generated(model, text, 3)[0]
    with attach(model, BipartiteMerging(), "50%"):
        for _ in range(2):
            generated(model, inputs, 2)
            assert torch.equal(logits(model, text), expected[0])
            assert torch.equal(generated(model, text, 3)[0], expected[1])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm", "voxtral", "granite_speech"])
def test_only_some_logits(family: str) -> None:
    model, inputs = shared(family), encode(family, rows_of(family))
    with attach(model, BipartiteMerging(), "50%"), torch.no_grad():
        for asked, kept in ((1, [-1]), (3, [-3, -2, -1]), (torch.tensor([4, 0]), [4, 0])):
            torch.testing.assert_close(model(**inputs, logits_to_keep=asked).logits, logits(model, inputs)[:, kept])


@FAMILIES
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    inputs = encode(family, rows_of(family))
    found = []
    for checkpointed in (False, True):
        model = copy.deepcopy(shared(family)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, BipartiteMerging(), "50%"):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles_with_marks_and_the_whole_view_are_one_picture(family: str) -> None:
    row, column, whole = 30, 31, 32
    model, inputs = shared(family), encode(family, [[*map(Picture, range(5)), 20, 21, 22, 23, 24, Picture(6)]])
    ids = inputs["input_ids"]
    starts = (ids[0] == START).nonzero().flatten()
    with attach(model, Uniform(), 6) as handle:
        logits(model, inputs)
        assert [u.native for u in handle.usage] == [4] * 6  # no marks: frames of a clip, or pictures in one view
        ids[0, starts] = torch.tensor([row, column, whole, row, whole, whole])
        logits(model, inputs)
        assert [(u.native, u.used) for u in handle.usage] == [(12, 6), (8, 6), (4, 4)]
        ids[0, starts[4:]] = torch.tensor([row, whole])  # text stands between a tile and this whole view
        logits(model, inputs)
        assert [u.native for u in handle.usage] == [12, 4, 4, 4]
