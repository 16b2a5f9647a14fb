"""Reports as files, intervals of means, and the dispatch of `tokenthrift evaluate`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tokenthrift import cli
from tokenthrift.evaluation.report import Table, new_figure, write_report
from tokenthrift.evaluation.statistics import bootstrap_interval, grouped_interval, mean_and_interval
from tokenthrift.registry import SYSTEMS, System, resolve

TABLE = Table(
    title="Errors",
    columns=("method", "tokens", "error", "met"),
    rows=(("a|b", 1234, 0.123456, True), ("c", 8, math.nan, False), ("d", None, 12345.6, None)),
    note="Lower is better.",
)


def test_table_as_markdown() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "## Errors",
        "",
        "| method | tokens | error | met |",
        "| --- | --- | --- | --- |",
        "| a\\|b | 1,234 | 0.1235 | yes |",
        "| c | 8 | nan | no |",
        "| d | - | 12,346 | - |",
        "",
        "Lower is better.",
    ]


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(title="t", columns=("a",), rows=((1, 2),))


def test_report_files(tmp_path: Path) -> None:
    figure, axes = new_figure()
    axes.plot([0, 1], [1, 0])
    for _ in range(2):  # a second report replaces the first
        write_report(
            tmp_path / "out", title="T", settings={"seed": 3}, tables=[TABLE], figures={"curve_a": figure}, notes=["N."]
        )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.json", "curve_a.png"}
    plain = json.loads((tmp_path / "out/report.json").read_text())
    assert plain["settings"] == {"seed": 3}
    assert plain["tables"][0]["rows"][1] == {"method": "c", "tokens": 8, "error": None, "met": False}
    text = (tmp_path / "out/report.md").read_text()
    assert text.startswith("# T\n\n| setting | value |\n| --- | --- |\n| seed | 3 |\n\nN.\n\n## Errors\n")
    assert text.endswith("![curve a](curve_a.png)\n")
    assert (tmp_path / "out/curve_a.png").read_bytes().startswith(b"\x89PNG")


def test_interval_of_runs() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3))
    assert mean_and_interval([5.0]) == (5.0, math.inf)
    assert mean_and_interval(list(range(41)))[1] == pytest.approx(2.0211 * math.sqrt(143.5 / 41), rel=1e-4)
    assert bootstrap_interval([5.0]) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_interval([])


def test_student_intervals_cover_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        mean, half = mean_and_interval(torch.randn(4, generator=generator, dtype=torch.float64).tolist())
        hits += abs(mean) <= half
    assert 0.92 <= hits / 400 <= 0.98


def test_intervals_of_splits_that_share_items_cover_the_mean() -> None:
    """Accuracy on 30 of 100 items, five times: what is measured is the mean over all items there could be."""
    generator = torch.Generator().manual_seed(0)
    hits = {0.0: 0, 30 / 70: 0}
    for _ in range(400):
        items = torch.randn(100, generator=generator, dtype=torch.float64)
        splits = [items[torch.randperm(100, generator=generator)[:30]].mean().item() for _ in range(5)]
        for ratio in hits:
            mean, half = mean_and_interval(splits, test_to_training=ratio)
            hits[ratio] += abs(mean) <= half
    assert hits[0.0] / 400 < 0.92  # as if the splits were independent
    assert hits[30 / 70] / 400 >= 0.93
    plain, corrected = (mean_and_interval([1.0, 2.0, 3.0], test_to_training=ratio)[1] for ratio in (0.0, 0.5))
    assert corrected == pytest.approx(plain * math.sqrt((1 / 3 + 0.5) / (1 / 3)))


def test_copies_of_an_item_do_not_make_a_mean_surer() -> None:
    once = grouped_interval([1.0, 2.0, 4.0], [0, 1, 2])
    assert once == pytest.approx(mean_and_interval([1.0, 2.0, 4.0]))
    assert grouped_interval([1.0, 2.0, 4.0] * 5, [0, 1, 2] * 5) == pytest.approx(once)
    assert grouped_interval([1.0, 3.0], [7, 7]) == (2.0, math.inf)
    with pytest.raises(ValueError, match="its group"):
        grouped_interval([1.0, 2.0], [0])


def test_bootstrap_is_repeatable_and_leaves_the_global_state() -> None:
    values = torch.linspace(0, 1, 50).tolist()
    before = torch.get_rng_state()
    first = bootstrap_interval(values)
    assert first == bootstrap_interval(values)
    assert torch.equal(before, torch.get_rng_state())
    mean, low, high = first
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * torch.tensor(values).std().item() / math.sqrt(50), rel=0.15)


def evaluator(argv: Sequence[str]) -> int:
    if argv == ["fail"]:
        raise ValueError("no such data")
    return 0 if argv == ["--model", "m"] else 3


def test_evaluate_hands_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SYSTEMS, "small", System(name="small", evaluator=f"{__name__}:evaluator"))
    assert cli.main(["evaluate", "small", "--model", "m"]) == 0
    assert cli.main(["evaluate", "small", "fail"]) == 1
    assert "tokenthrift evaluate small: no such data" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "nothing"])


@pytest.mark.parametrize(
    ("system", "model"),
    [
        ("karl", "tokenthrift.karl.model:Karl"),
        ("vqtoken", "tokenthrift.vqtoken:VideoAnswerer"),
        ("mtsk", "tokenthrift.mtsk:LlamaMtsk"),
    ],
)
def test_every_evaluation_takes_a_revision(
    system: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(source: str, *, revision: str | None = None, **options: object) -> None:
        raise ValueError(f"{source} at {revision}")

    monkeypatch.setattr(resolve(model), "from_pretrained", load)
    arguments = ["--model", "org/model", "--revision", "v2", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", system, *arguments]) == 1
    assert "org/model at v2" in capsys.readouterr().err
