"""`allocate_by_value` spends where quality grows most: equal to brute force; and the file that curves come from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.allocation import allocate_by_value
from tokenthrift.budget import BudgetError
from tokenthrift.quality import QUALITY, QualityCurve, QualityError, read_quality, write_quality


def curve(*points: tuple[int, float], **texts: str) -> QualityCurve:
    return QualityCurve(tokens=tuple(n for n, _ in points), quality=tuple(q for _, q in points), **texts)


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=5, unique_by=lambda p: p[0])
CURVES = POINTS.map(lambda points: curve(*((n, q / 20) for n, q in sorted(points))))
ITEMS = st.lists(
    st.tuples(CURVES, st.integers(0, 2), st.integers(0, 8), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    min_size=1,
    max_size=3,
)


@given(ITEMS, st.integers(0, 14))
def test_the_expected_quality_is_that_of_brute_force(
    items: list[tuple[QualityCurve, int, int, float]], spare: int
) -> None:
    curves, floors, weights = [i[0] for i in items], [i[1] for i in items], [i[3] for i in items]
    caps = [i[1] + i[2] for i in items]
    total = sum(floors) + spare

    def worth(shares: tuple[int, ...]) -> float:
        return sum(w * c.at(n) for w, c, n in zip(weights, curves, shares, strict=True))

    found = allocate_by_value(curves, total, floors=floors, caps=caps, weights=weights)
    every = itertools.product(*(range(low, high + 1) for low, high in zip(floors, caps, strict=True)))
    best = max(worth(shares) for shares in every if sum(shares) <= total)
    assert worth(tuple(found)) == pytest.approx(best, abs=1e-9)
    assert sum(found) <= total
    assert all(low <= n <= high for low, n, high in zip(floors, found, caps, strict=True))
    more = allocate_by_value(curves, total + 1, floors=floors, caps=caps, weights=weights)
    assert all(n <= m for n, m in zip(found, more, strict=True))


@given(CURVES)
def test_the_hull_is_above_the_points_concave_and_never_falls(measured: QualityCurve) -> None:
    values = [measured.at(n) for n in range(12)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains))
    assert all(gain >= -1e-12 for gain in gains)
    assert all(measured.at(n) >= q - 1e-12 for n, q in zip(measured.tokens, measured.quality, strict=True))
    assert set(measured.hull()) <= {(0, 0.0), *zip(measured.tokens, measured.quality, strict=True)}


def test_tokens_go_where_they_buy_most_and_no_further() -> None:
    steep, slow = curve((0, 0.1), (4, 0.9), (32, 1.0)), curve((0, 0.1), (32, 0.9))
    assert allocate_by_value([steep, slow], 4, floors=[0, 0], caps=[64, 64]) == [4, 0]
    assert allocate_by_value([steep, slow], 36, floors=[0, 0], caps=[64, 64]) == [4, 32]
    assert allocate_by_value([steep, slow], 200, floors=[0, 0], caps=[64, 64]) == [32, 32]  # the rest buys nothing
    assert allocate_by_value([steep, slow], 8, floors=[0, 0], caps=[64, 64], weights=[0.1, 1]) == [0, 8]
    assert allocate_by_value([], 8, floors=[], caps=[]) == []
    with pytest.raises(BudgetError, match="sum of the floors"):
        allocate_by_value([steep, slow], 4, floors=[3, 3], caps=[9, 9])
    with pytest.raises(ValueError, match="1 weights"):
        allocate_by_value([steep, slow], 4, floors=[0, 0], caps=[9, 9], weights=[1])


def test_a_point_below_the_line_between_its_neighbors_is_not_believed() -> None:
    measured = curve((0, 0.0), (2, 0.05), (4, 0.8), (8, 0.7))
    assert measured.hull() == [(0, 0.0), (4, 0.8)]
    assert measured.at(2) == pytest.approx(0.4)
    assert measured.at(100) == 0.8


def test_curves_are_plain_data_beside_a_model(tmp_path: Path) -> None:
    image = curve((1, 0.25), (8, 0.5), kind="image", metric="accuracy", data="photos, development part", command="x")
    write_quality(tmp_path, [image, curve((4, 1.0), kind="audio")])
    write_quality(tmp_path, [curve((4, 0.5), kind="audio")])
    assert read_quality(tmp_path) == {"image": image, "audio": curve((4, 0.5), kind="audio")}
    assert json.loads((tmp_path / QUALITY).read_text())["curves"][0]["quality"] == [0.25, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == [QUALITY]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "format_version"),
        ('{"format_version": 1, "curves": [{"tokens": [1]}]}', "curve 0: expected tokens, quality"),
        ('{"format_version": 1, "curves": [{"tokens": [1], "quality": [NaN]}]}', "NaN is not JSON"),
        ('{"format_version": 1, "curves": [{"tokens": [2, 1], "quality": [0, 1]}]}', "curve 0: counts are whole"),
        ('{"format_version": 1, "curves": [{"tokens": [1], "quality": [2]}]}', "between 0 and 1"),
        ('{"format_version": 1, "curves": [{"tokens": [1], "quality": [true]}]}', "between 0 and 1"),
        ('{"format_version": 1, "curves": [{"tokens": [1], "quality": [1], "code": "x"}]}', "expected tokens"),
        ('{"format_version": 1, "curves": [{"tokens": [1], "quality": [1], "kind": 3}]}', "are texts"),
        ('{"format_version": 1, "curves": [{"tokens": [], "quality": []}]}', "as many, from 1"),
        (
            '{"format_version": 1, "curves": [{"tokens": [1], "quality": [1]}, {"tokens": [1], "quality": [1]}]}',
            "curve 1: a second curve",
        ),
    ],
)
def test_what_is_no_curve_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / QUALITY).write_text(text)
    with pytest.raises(QualityError, match=message):
        read_quality(tmp_path)
