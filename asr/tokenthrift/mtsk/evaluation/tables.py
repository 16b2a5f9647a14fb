"""What an evaluation found, as tables and a plot.

Source: the tables of Llama-MTSK (arXiv 2503.06362): errors at every pair of rates and level of babble, one
model against one model per pair of rates and against pooling without training. A figure that was not measured is
shown as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenthrift.evaluation.report import Cell, Table, new_figure
from tokenthrift.evaluation.wer import ErrorCount
from tokenthrift.mtsk.rates import Measured, Rates

__all__ = [
    "INDEPENDENT",
    "POOLED",
    "EvaluationRow",
    "comparison_table",
    "control_table",
    "error_plot",
    "error_table",
    "measured",
    "noise_plot",
    "together",
]

INDEPENDENT, POOLED = "independent", "pooled"
STREAMS = {(True, True): "both streams", (True, False): "audio alone", (False, True): "video alone"}
COLORS = ("#00695c", "#c62828", "#5c6bc0")
STYLES = {(True, True): "-", (True, False): "--", (False, True): ":"}


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """The errors of one model on one set in one condition at one pair of rates.

    Attributes:
        model: its name; several models may share one, as those of one pair of rates each.
        rates: of its tokens.
        snr: of the babble in dB; None for clean audio.
        control: one of `CONTROLS`, or empty.
        words: word errors.
        characters: character errors.
        tokens: mean tokens of audio and video per item.
    """

    model: str
    rates: Rates
    snr: float | None
    control: str
    words: ErrorCount
    characters: ErrorCount
    tokens: float


def together(sets: Sequence[tuple[Sequence[EvaluationRow], int]]) -> list[EvaluationRow]:
    """Several sets as one: all their errors over all their words. Rows that one of them lacks are left out.

    Args:
        sets: the rows of each and how many items it has; one set or more.
    """
    each = [({(r.model, r.rates, r.snr, r.control): r for r in rows}, items) for rows, items in sets]
    out = []
    for key, first in each[0][0].items():
        found = [(rows[key], items) for rows, items in each if key in rows]
        if len(found) == len(each):
            words, characters = (
                sum((getattr(r, unit) for r, _ in found), ErrorCount()) for unit in ("words", "characters")
            )
            tokens = sum(r.tokens * items for r, items in found) / sum(items for _, items in found)
            out.append(replace(first, words=words, characters=characters, tokens=tokens))
    return out


def error_table(title: str, rows: Sequence[EvaluationRow], snrs: Sequence[float | None], note: str = "") -> Table:
    """Word and character errors in per cent for each model and pair of rates, a column for each level."""
    plain = {(r.model, r.rates, r.snr): r for r in rows if not r.control}
    lines: list[tuple[Cell, ...]] = []
    for model, rates in dict.fromkeys((r.model, r.rates) for r in rows):
        at = [plain.get((model, rates, snr)) for snr in snrs]
        some = next((r for r in at if r is not None), None)
        if some is not None:
            words = [None if r is None else 100 * r.words.rate for r in at]
            letters = [None if r is None else 100 * r.characters.rate for r in at]
            lines.append((model, str(rates), some.tokens, *words, *letters))
    columns = [f"{unit} {_level(snr)}" for unit in ("WER", "CER") for snr in snrs]
    units = "Rates are encoder states per token, 0 for a stream that is left out; errors in per cent of the corpus."
    return Table(
        title=title,
        columns=("model", "(audio, video) rates", "tokens per item", *columns),
        rows=tuple(lines),
        note=f"{units} {note}".strip(),
    )


def control_table(title: str, rows: Sequence[EvaluationRow]) -> Table | None:
    """Word errors in per cent with a stream made useless, beside the same condition as it is."""
    plain = {(r.model, r.rates, r.snr): r for r in rows if not r.control}
    lines: list[tuple[Cell, ...]] = []
    for r in rows:
        if r.control:
            whole = plain.get((r.model, r.rates, r.snr))
            as_is = None if whole is None else 100 * whole.words.rate
            lines.append((r.model, str(r.rates), r.control, _level(r.snr), as_is, 100 * r.words.rate))
    columns = ("model", "(audio, video) rates", "control", "babble", "WER as it is", "WER")
    return Table(title=title, columns=columns, rows=tuple(lines)) if lines else None


def comparison_table(title: str, rows: Sequence[EvaluationRow], name: str, snr: float = 0.0) -> Table | None:
    """How one model for many rates compares with its baselines, in points of WER.

    Args:
        title: of the table.
        rows: of one set; models named `independent` and `pooled` are the baselines.
        name: of the model; None comes back where it has fewer than two pairs of rates that take both streams.
        snr: level at which the gain from lips is measured.
    """
    errors = {(r.model, r.rates, r.snr, r.control): 100 * r.words.rate for r in rows}
    scales = sorted({r.rates for r in rows if r.model == name and r.rates.audio and r.rates.video}, key=_fineness)
    if len(scales) < 2:
        return None
    fine, coarse = scales[0], scales[-1]

    def rise(model: str) -> float | None:
        return _minus(errors.get((model, coarse, None, "")), errors.get((model, fine, None, "")))

    def gain(control: str) -> float | None:
        alone, both = errors.get((name, Rates(fine.audio), snr, "")), errors.get((name, fine, snr, control))
        return None if not alone or both is None else 100 * (1 - both / alone)

    gaps = [_minus(*(errors.get((model, rates, None, "")) for model in (name, INDEPENDENT))) for rates in scales]
    known = [gap for gap in gaps if gap is not None]
    lines: list[tuple[Cell, ...]] = [
        (
            "above independent models, mean over rates",
            sum(known) / len(gaps) if len(known) == len(gaps) else None,
        ),
        (f"fewer errors of {fine} than of its audio alone at {snr:g} dB, relative %", gain("")),
        ("the same with shuffled video", gain("shuffled video")),
        ("the same with still video", gain("still video")),
        (f"rise from {fine} to {coarse}", rise(name)),
        ("the same, pooled without training", rise(POOLED)),
    ]
    note = "Points of WER on clean audio unless a line says otherwise; - was not measured."
    return Table(title=title, columns=("what", f"measured of {name}"), rows=tuple(lines), note=note)


def measured(
    rows: Sequence[EvaluationRow], name: str, milliseconds: Mapping[Rates, float] | None = None
) -> tuple[Measured, ...]:
    """The table from which a model's budgets choose its rates: word errors by pair and level, over all sets given.

    Args:
        rows: of any sets.
        name: of the model.
        milliseconds: for a second of speech at each pair of rates, where that was measured.
    """
    counts: dict[tuple[Rates, float | None], ErrorCount] = {}
    for r in rows:
        if r.model == name and not r.control:
            counts[r.rates, r.snr] = counts.get((r.rates, r.snr), ErrorCount()) + r.words
    times = {rates: round(time, 3) for rates, time in (milliseconds or {}).items()}
    return tuple(
        Measured(
            audio=rates.audio,
            video=rates.video,
            wer=round(count.rate, 5),
            snr=snr,
            milliseconds=times.get(rates),
        )
        for (rates, snr), count in counts.items()
    )


def error_plot(rows: Sequence[EvaluationRow], snrs: Sequence[float | None]) -> Any:
    """Word errors against tokens, a panel for the least noise and one for the loudest babble, a line per streams."""
    order = sorted(set(snrs), key=lambda snr: float("inf") if snr is None else snr)
    panels = list(dict.fromkeys([order[-1], order[0]]))
    figure, axes = new_figure(11.0, 4.0, ncols=len(panels), squeeze=False)
    models = list(dict.fromkeys(r.model for r in rows))
    for panel, snr in zip(axes[0], panels, strict=True):
        here = [r for r in rows if r.snr == snr and not r.control]
        for model, streams in dict.fromkeys((r.model, _streams(r.rates)) for r in here):
            points = sorted(
                (r.tokens, 100 * r.words.rate) for r in here if (r.model, _streams(r.rates)) == (model, streams)
            )
            look = {"color": f"C{models.index(model) % 10}", "linestyle": STYLES[streams]}
            panel.plot(*zip(*points, strict=True), marker="o", label=f"{model}, {STREAMS[streams]}", **look)
        panel.set(xlabel="tokens per item", ylabel="WER, %", title=_level(snr))
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")  # beside the lines, not on them
    return figure


def noise_plot(rows: Sequence[EvaluationRow], snrs: Sequence[float | None], model: str) -> Any:
    """Word errors of one model against the noise, a line for sound, lips and both, each at its finest rates."""
    order = sorted(set(snrs), key=lambda snr: float("inf") if snr is None else snr, reverse=True)
    figure, axis = new_figure(5.0, 3.6)
    own = [r for r in rows if r.model == model and not r.control]
    for color, streams in zip(COLORS, STREAMS, strict=True):
        here = [r for r in own if _streams(r.rates) == streams]
        if not here:
            continue
        finest = min((r.rates for r in here), key=_fineness)
        points = {r.snr: 100 * r.words.rate for r in here if r.rates == finest}
        x = [i for i, snr in enumerate(order) if snr in points]
        y = [points[order[i]] for i in x]
        axis.plot(x, y, color=color, marker="o", markersize=4)
        # Noise does not change lips: their line is level, so its name stands over its beginning.
        at, offset = (0, (0, 8)) if streams == (False, True) else (-1, (6, 0))
        label: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "va": "center", "fontsize": 8}
        axis.annotate(f"{STREAMS[streams]}, {finest}", (x[at], y[at]), color=color, **label)
    axis.set(xticks=range(len(order)), xticklabels=[_level(snr) for snr in order], ylim=(0, None))
    axis.set(xlabel="speech above the noise", ylabel="word error rate (%)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _streams(rates: Rates) -> tuple[bool, bool]:
    return bool(rates.audio), bool(rates.video)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _fineness(rates: Rates) -> tuple[int, int]:
    return rates.audio, rates.video


def _level(snr: float | None) -> str:
    return "clean" if snr is None else f"{snr:g} dB"
