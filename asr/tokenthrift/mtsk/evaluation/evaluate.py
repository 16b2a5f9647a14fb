"""`tokenthrift evaluate mtsk`: errors against tokens for every pair of rates, with noise, controls and costs.

    tokenthrift evaluate mtsk --model MS=model_cards/mtsk-tiny-en --model independent=A --model independent=B \\
        --pool A --data synthetic=speech/test/grid --babble speech/babble/test.flac --out report

Source: the tables of Llama-MTSK (arXiv 2503.06362): one model against one model per pair of rates, against pooling
without training, and babble (`conditions`). What differs: the FLOPs of encoders and decoding are counted beside those
of the prefix (`cost`). Each set has tables of its own under its name; those whose names begin with `synthetic` are also
taken together, all errors over all words, and are never mixed with others. A set whose manifest says `"lips":
"rendered"` is called "real voice, rendered lips" in every table. What every model wrote is counted in
`rows.json` before any table is made of it.

Pooling without training starts from a model of one pair of rates, the finest: the independent one of (4, 2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tokenthrift.evaluation.report import Cell, Table, write_report
from tokenthrift.evaluation.wer import normalize_english
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk.evaluation.conditions import unpunctuated
from tokenthrift.mtsk.evaluation.cost import Cost, cost_table, costs
from tokenthrift.mtsk.evaluation.pooling import pooled
from tokenthrift.mtsk.evaluation.runs import evaluate, readable
from tokenthrift.mtsk.evaluation.tables import (
    INDEPENDENT,
    POOLED,
    EvaluationRow,
    comparison_table,
    control_table,
    error_plot,
    error_table,
    measured,
    noise_plot,
    together,
)
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.training.clips import Clip, ManifestClips
from tokenthrift.mtsk.transcribing import Recording
from tokenthrift.quality import QualityCurve, measured_curve, save_curves
from tokenthrift.sources import is_folder

__all__ = ["run"]

TOGETHER = "synthetic"
NORMALIZERS = {"published": unpunctuated, "whisper": normalize_english}
RENDERED = "real voice, rendered lips"
SYNTHETIC = "Synthetic sets: rendered mouths and text-to-speech voices; no figure of theirs compares with one of LRS."


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures models and writes the report.

    Args:
        arguments: as `command` reads them.
        argv: the same as text, for the report.
    """
    snrs = arguments.snr if arguments.babble else [None]
    # A folder has no revisions; of several models the one on the Hub is meant.
    named = [(name or "model", path) for name, path in arguments.model]
    of = arguments.revision
    models = [
        (name, LlamaMtsk.from_pretrained(path, revision=None if len(named) > 1 and is_folder(path) else of))
        for name, path in named
    ]
    if arguments.pool:
        rates = models[0][1].config
        finest = LlamaMtsk.from_pretrained(arguments.pool)
        models.append((POOLED, pooled(finest, rates.audio_rates, rates.video_rates)))
    babble = read_audio(arguments.babble) if arguments.babble else None
    normalize = NORMALIZERS[arguments.normalizer]
    sets: dict[str, tuple[list[Clip], list[EvaluationRow], str]] = {}
    titles: dict[str, str] = {}
    skipped: list[str] = []
    for name, path in arguments.data:
        manifest = ManifestClips(Path(path) / "manifest.jsonl")
        rendered = any(row.get("lips") == "rendered" for row in manifest.rows)
        titles[name] = f"{name} ({RENDERED})" if rendered else name
        clips, wrong = readable(manifest, arguments.limit)
        skipped += [f"{name}, left out: {what}" for what in wrong]
        print(*skipped[len(skipped) - len(wrong) :], sep="\n", end="\n" if wrong else "", file=sys.stderr)
        rows = evaluate(models, clips, babble, snrs, seed=arguments.seed, normalize=normalize)
        sets[name] = clips, rows, _homophenes(Path(path))
        _keep(arguments.out / "rows.json", {name: rows for name, (_, rows, _) in sets.items()})
    tables: list[Table] = []
    figures = {}
    spent: list[Cost] = []
    first, model = models[0]
    for name, (clips, rows, note) in sets.items():
        tables += _results(_counted(titles[name], clips, normalize), titles[name], rows, snrs, note)
        found = costs(model, _middle(clips))
        spent += found
        tables.append(cost_table(f"{titles[name]}: cost of one item of middle length", found))
        figures[f"errors_{name}"] = error_plot(rows, snrs)
        if len(snrs) > 2:
            figures[f"noise_{name}"] = noise_plot(rows, snrs, first)
    synthetic = {name: own for name, own in sets.items() if name.startswith(TOGETHER)}
    if len(synthetic) > 1:
        clips = [clip for own, _, _ in synthetic.values() for clip in own]
        rows = together([(rows, len(own)) for own, rows, _ in synthetic.values()])
        note = f"All errors of {', '.join(synthetic)} over all their words."
        title = "all synthetic sets"
        tables += _results(_counted(title, clips, normalize), title, rows, snrs, note)
    if arguments.table is not None:
        everything = [row for _, rows, _ in sets.values() for row in rows]
        model.config = replace(model.config, table=measured(everything, first, _milliseconds(spent)))
        model.save_pretrained(arguments.table, dtype=torch.float16)
    settings: Mapping[str, Cell] = {
        "command": f"tokenthrift evaluate mtsk {' '.join(argv)}",
        "models": ", ".join(f"{name}={path}" if name else path for name, path in arguments.model),
        "normalizer": arguments.normalizer,
        "noise": arguments.babble,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
    }
    write_report(
        arguments.out,
        title="Llama-MTSK: errors against tokens",
        settings=settings,
        tables=tables,
        figures=figures,
        notes=[*([SYNTHETIC] if synthetic else []), *skipped],
    )
    own = [row for _, rows, _ in sets.values() for row in rows if row.model == first]
    found_curves = quality_curves(own, ", ".join(titles.values()), str(settings["command"]))
    # Where a budget window looks for them is beside a model, and what a user's own data say of a model stays out of it.
    save_curves(arguments.table or arguments.out, arguments.out, found_curves)
    print(f"{arguments.out}/report.md", file=sys.stderr)
    return 0


def quality_curves(rows: Sequence[EvaluationRow], data: str, command: str) -> list[QualityCurve]:
    """1 - WER on clean items by mean tokens, for each kind of input: sound, lips (video), or both (talking).

    Args:
        rows: of one model.
        data: the sets, in words.
        command: what measured them.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.snr is None and not row.control and row.words.total:
            kind = "talking" if row.rates.audio and row.rates.video else "audio" if row.rates.audio else "video"
            points.setdefault(kind, []).append((round(row.tokens), 1 - row.words.errors / row.words.total))
    texts = {"metric": "1 - WER, clean, at the mean tokens of an item", "data": data, "command": command}
    return [measured_curve(own, kind=kind, **texts) for kind, own in sorted(points.items())]


def _counted(name: str, clips: Sequence[Clip], normalize: Callable[[str], str]) -> str:
    """The title of a set, with its items and its words as they are compared."""
    return f"{name}: {len(clips)} items, {sum(len(normalize(clip.text).split()) for clip in clips)} words"


def _results(
    title: str, name: str, rows: Sequence[EvaluationRow], snrs: Sequence[float | None], note: str
) -> list[Table]:
    """Errors, controls and baselines of one set, printed too."""
    more = [control_table(f"{name}: controls", rows)]
    for many in dict.fromkeys(r.model for r in rows if r.model not in (INDEPENDENT, POOLED)):
        more.append(comparison_table(f"{name}: {many} beside its baselines", rows, many))
    tables = [error_table(title, rows, snrs, note), *(table for table in more if table is not None)]
    for table in tables:
        print(table.to_markdown(), end="\n\n", flush=True)
    return tables


def _middle(clips: Sequence[Clip]) -> Clip:
    return sorted(clips, key=lambda clip: Recording(clip.audio, clip.video).seconds)[len(clips) // 2]


def _milliseconds(spent: Sequence[Cost]) -> dict[Rates, float]:
    """For a second of speech at each pair of rates, the mean over sets."""
    each: dict[Rates, list[float]] = {}
    for cost in spent:
        each.setdefault(cost.rates, []).append(cost.milliseconds)
    return {rates: sum(times) / len(times) for rates, times in each.items()}


def _homophenes(folder: Path) -> str:
    """What lips can say at best, where the maker of the set counted it."""
    file = next((f for f in (folder / "homophenes.json", folder.parent / "homophenes.json") if f.exists()), None)
    if file is None:
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    own = found.get("kinds", {}).get(folder.name)
    whose = "this set" if own else "all kinds of phrases together"
    share = 100 * (own or found)["homophene_bound"]
    return f"Lips alone, read word by word without context, get at least {share:.3g} % of the words of {whose} wrong."


def _keep(path: Path, sets: Mapping[str, Sequence[EvaluationRow]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"set": name, **asdict(row)} for name, own in sets.items() for row in own]
    whole = path.with_name(f".{path.name}.part")
    whole.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    os.replace(whole, path)
