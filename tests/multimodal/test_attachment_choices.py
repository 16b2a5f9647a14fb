"""A reducer and a budget for each modality, one budget an item, one total for a prompt, and all of it as text."""

from typing import Any

import pytest
import torch

from tests.multimodal.tiny_families import encode, shared
from tests.multimodal.tiny_media import Recording, Row
from tests.multimodal.tiny_vlms import Clip, Picture, logits
from tokenthrift.attachment import attach, reducer_from
from tokenthrift.budget import BudgetError
from tokenthrift.reducers import AveragePooling, BipartiteMerging, NormPruning, QuerySelection, Uniform
from tokenthrift.tokens import TokenBatch

OMNI = "qwen2_5_omni_thinker"
# 8 and 4 tokens of pictures, 8 of a clip, 16 of a recording; then 4 of a picture.
ROWS: list[Row] = [
    [10, Picture(1, 16, 32), 11, Picture(2), 12, Clip(3), 13, Recording(4), 14],
    [20, Picture(5), 21],
]


def used(budget: Any = None, reducer: Any = None, rows: list[Row] = ROWS, **kwargs: Any) -> list[int]:
    with attach(shared(OMNI), Uniform() if reducer is None else reducer, budget, **kwargs) as handle:
        logits(shared(OMNI), encode(OMNI, rows))
    return [usage.used for usage in handle.usage]


def test_a_reducer_and_a_budget_for_each_modality() -> None:
    reducers = {"image": Uniform(), "video": AveragePooling(), "audio": BipartiteMerging()}
    model, inputs = shared(OMNI), encode(OMNI, ROWS)
    with attach(model, reducers, {"image": "50%", "video": "25%", "audio": 3}) as handle:
        together = logits(model, inputs)
    assert {name: [u.used for u in usage] for name, usage in handle.usage_by_modality.items()} == {
        "image": [4, 2, 2],
        "video": [2],
        "audio": [3],
    }
    assert [u.used for u in handle.usage] == [4, 2, 2, 3, 2]
    with attach(model, {"audio": BipartiteMerging()}, "25%") as handle:
        assert not torch.equal(logits(model, inputs), together)
    assert list(handle.usage_by_modality) == ["audio"]
    assert used({"audio": "25%"}) == [4]
    assert used("25%", modalities=("video", "audio")) == [2, 4]
    # The same reducer in a mapping is the reducer alone.
    with attach(model, Uniform(), "50%"):
        alone = logits(model, inputs)
    with attach(model, {"image": Uniform(), "video": Uniform(), "audio": Uniform()}, "50%"):
        torch.testing.assert_close(logits(model, inputs), alone, rtol=0, atol=1e-5)


def test_one_budget_an_item() -> None:
    assert used(["50%", 1, "25%", 5, 3]) == [4, 1, 2, 5, 3]
    with pytest.raises(ValueError, match="5 items but 2 budgets"):
        used(["50%", 1])


@pytest.mark.parametrize(
    ("total", "expected"), [(36, [8, 4, 8, 16, 4]), (18, [4, 2, 4, 8, 4]), (4, [1, 1, 1, 1, 4]), (3, None)]
)
def test_a_total_is_shared_by_the_items_of_a_row(total: int, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(BudgetError, match="3 tokens for 4 items"):
            used(total=total)
    else:
        assert used(total=total) == expected


def test_a_total_with_ceilings_reducers_and_beams() -> None:
    reducers = {"image": Uniform(), "audio": BipartiteMerging()}
    assert used({"image": None, "audio": 6}, reducers, total=16) == [7, 3, 6, 4]
    assert used("75%", total=100) == [6, 3, 6, 12, 3]  # the share of each item holds besides
    model = shared(OMNI)
    with attach(model, Uniform(), total=18) as handle:
        model.generate(**encode(OMNI, ROWS), max_new_tokens=1, num_beams=2, do_sample=False)
    assert [u.used for u in handle.usage] == [4, 2, 4, 8] * 2 + [4] * 2


def test_what_does_not_fit_together_raises() -> None:
    model = shared("llava")
    for arguments, options, message in (
        (({"audio": Uniform()}, "4"), {}, "audio; this model reads image"),
        (({"image": Uniform()}, {"video": "4"}), {}, "video; this model reads image"),
        ((Uniform(), "4"), {"modalities": ("video",)}, "video; this model reads image"),
        ((Uniform(), "4"), {"total": 0}, "a total of 0"),
        ((Uniform(), ["4", "e0.1"]), {}, "target_error"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, *arguments, **options).__enter__()
    with pytest.raises(ValueError, match="image, video is reduced, but reducers or budgets are for image"):
        attach(shared(OMNI), {"image": Uniform()}, "4", modalities=("image", "video")).__enter__()


def test_text_names_a_reducer_and_a_budget() -> None:
    model, inputs = shared("llava"), encode("llava", [[10, Picture(1), 11]])
    for text, reducer, count in (
        ("tome:25%", BipartiteMerging, 4),
        ("norm:7", NormPruning, 7),
        ("uniform", Uniform, 16),
        ("pool: 50%", AveragePooling, 8),
    ):
        with attach(model, text) as handle:
            logits(model, inputs)
        assert [u.used for u in handle.usage] == [count]
        assert type(reducer_from(text.split(":")[0])) is reducer
    with attach(model, "tome", "25%") as handle:
        logits(model, inputs)
    assert [u.used for u in handle.usage] == [4]
    with attach(shared(OMNI), {"image": "uniform", "audio": "tome"}, {"image": 2, "audio": 3}) as handle:
        logits(shared(OMNI), encode(OMNI, ROWS))
    assert [u.used for u in handle.usage] == [2, 2, 3, 2]
    with pytest.raises(ValueError, match=r"no reducer named 'tom'; there are .*tome"):
        attach(model, "tom:25%").__enter__()
    with pytest.raises(ValueError, match="a budget twice"):
        attach(model, "tome:25%", "50%").__enter__()


def test_a_reducer_that_reads_the_question_is_given_the_text_of_the_row() -> None:
    model = shared("llava")
    rows: list[Row] = [[10, Picture(1), 11, 12], [20, Picture(2), 21, 22, 23, 24]]
    seen: list[Any] = []

    class Spy(QuerySelection):
        def reduce(self, tokens: TokenBatch, budget: Any, query: Any = None) -> TokenBatch:
            seen.append(query)
            return super().reduce(tokens, budget, query)

    with attach(model, Spy(), "25%"):
        alone = [logits(model, encode("llava", [row]))[0] for row in rows]
        inputs = encode("llava", rows, "right")
        for got, real, expected in zip(logits(model, inputs), inputs["attention_mask"].bool(), alone, strict=True):
            torch.testing.assert_close(got[real], expected, rtol=0, atol=1e-4)
    words = [[10, 1, 2, 11, 12], [20, 1, 2, 21, 22, 23, 24]]  # START and END are text
    table = model.get_input_embeddings().weight
    for query in ([*seen[0], *seen[1]], seen[2]):
        assert all(torch.equal(found, table[ids]) for found, ids in zip(query, words, strict=True))
