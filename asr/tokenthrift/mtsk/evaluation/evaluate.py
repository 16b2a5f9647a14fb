"""`tokenthrift evaluate mtsk`: errors against tokens for every pair of rates, with noise, controls and costs.

    tokenthrift evaluate mtsk --model MS=model_cards/mtsk-tiny-en --model independent=A --model independent=B \\
        --pool A --data synthetic=speech/test/grid --babble speech/babble/test.flac --out report

Source: the tables of Llama-MTSK (arXiv 2503.06362): one model against one model per pair of rates, against pooling
without training, and babble (`conditions`). What differs: the FLOPs of encoders and decoding are counted beside those
of the prefix (`cost`). Each set has tables of its own under its name; those whose names begin with `synthetic` are also
taken together, all errors over all words, and are never mixed with others. What every model wrote is counted in
`rows.json` before any table is made of it.

Pooling without training starts from a model of one pair of rates, the finest: the independent one of (4, 2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from tokenthrift.evaluation.report import Cell, Table, write_report
from tokenthrift.evaluation.wer import character_errors, word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk import frozen
from tokenthrift.mtsk.conditions import conditions, noisy, spoilt, unpunctuated
from tokenthrift.mtsk.cost import Cost, cost_table, costs
from tokenthrift.mtsk.data import UNREADABLE, Clip, ManifestClips
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.module import Origin, carried_over
from tokenthrift.mtsk.rates import Rates, price
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.tables import (
    INDEPENDENT,
    POOLED,
    Heard,
    control_table,
    error_plot,
    error_table,
    measured,
    promises,
    together,
)
from tokenthrift.mtsk.transcribing import Item, token_limit

__all__ = ["evaluate", "main", "pooled", "readable"]

TOGETHER = "synthetic"
SYNTHETIC = "Synthetic sets: rendered mouths and text-to-speech voices; no figure of theirs compares with one of LRS."


def pooled(model: LlamaMTSK, audio_rates: Sequence[int], video_rates: Sequence[int]) -> LlamaMTSK:
    """A model at rates it was never trained for: the same projectors and adapters over coarser tokens.

    Args:
        model: of one pair of rates, whose tokens are means of states; its independent training is the base from which
            the loss of pooling without training is counted.
        audio_rates: its own and coarser; () where it does not listen.
        video_rates: its own and coarser; () where it does not look.

    Raises:
        ValueError: a model that cannot be pooled, or rates finer than its own.
    """
    config = model.config
    if config.lora.strategy != "MS":
        raise ValueError("only a model with one adapter for all scales (MS) can be pooled without training")
    if config.compression != "average":
        raise ValueError("a projector of stacked states fits one rate alone and cannot be pooled")
    for name, rates in (("audio", audio_rates), ("video", video_rates)):
        own: tuple[int, ...] = getattr(config, f"{name}_rates")
        if len(own) > 1:
            raise ValueError(f"a model of several {name} rates {list(own)} was trained for them; pool one of one pair")
        if any(not own or rate < own[0] for rate in rates):
            raise ValueError(f"{name} rates {list(rates)} are finer than {list(own)}, so not to be had by pooling")
    config = replace(config, audio_rates=tuple(audio_rates), video_rates=tuple(video_rates), table=())
    coarse = LlamaMTSK(config, model.tokenizer, model.home).eval()
    coarse.load_state_dict(carried_over(coarse, model.state_dict(), Origin.of(model.config)))
    frozen.fill(coarse)
    return coarse


def readable(data: ManifestClips, limit: int | None = None) -> tuple[list[Clip], list[str]]:
    """The clips of a manifest that can be read, and for each of the others what is wrong with it.

    Args:
        data: the manifest.
        limit: most lines to look at.
    """
    clips, wrong = [], []
    for i in range(min(len(data), limit or len(data))):
        try:
            clips.append(data[i])
        except UNREADABLE as error:
            wrong.append(str(error))
    return clips, wrong


def batches(clips: Sequence[Clip], size: int = 16) -> Iterator[list[int]]:
    """Places of clips of like length."""
    order = sorted(range(len(clips)), key=lambda i: _item(clips[i]).seconds)
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def evaluate(
    models: Sequence[tuple[str, LlamaMTSK]],
    clips: Sequence[Clip],
    babble: Tensor | None,
    snrs: Sequence[float | None],
    *,
    seed: int = 0,
) -> list[Heard]:
    """Every model at each of its scales in each condition.

    Args:
        models: name and model; all with the same frozen encoders, which run once for all of them.
        clips: one set, either all or none with audio, and with video.
        babble: noise for the levels that are not None.
        snrs: levels in dB; None for clean.
        seed: of the noise.

    Raises:
        ValueError: there is no clip, the encoders differ, only some clips have a stream, a level is asked for without
            noise, or no two clips differ in what is said, so that their lips cannot be shuffled.
    """
    if not clips:
        raise ValueError("there is no clip to be evaluated on")
    first = models[0][1]
    for name, model in models[1:]:
        if not _same_encoders(first, model):
            raise ValueError(f"{name} has other encoders than {models[0][0]}; evaluate it on its own")
    streams = (_has(clips, "audio"), _has(clips, "video"))
    if not streams[0]:
        snrs = [None]
    if babble is None and any(snr is not None for snr in snrs):
        raise ValueError("levels of noise were asked for, but no noise was given")
    passes = conditions(snrs, controls=all(streams))
    versions = {control: spoilt(clips, control) for _, control in passes}
    out = []
    lips: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # noise does not change what is seen
    for snr, control in passes:
        here = versions[control] if babble is None else noisy(versions[control], babble, snr, seed)
        found: dict[tuple[int, Rates], dict[int, str]] = {}
        for place, rows in enumerate(batches(here)):
            states: dict[str, Tensor] = {}
            if streams[0] and first.audio_encoder is not None:
                audio = [clip.audio for i in rows if (clip := here[i]).audio is not None]
                states["audio"], states["audio_lengths"] = first.encode_audio(audio)
            if streams[1] and first.video_encoder is not None:
                key = (control if "video" in control else "", place)
                if key not in lips:
                    lips[key] = first.encode_video([clip.video for i in rows if (clip := here[i]).video is not None])
                states["video"], states["video_lengths"] = lips[key]
            encoded = Encoded(**states)
            for number, (_, model) in enumerate(models):
                scales = _offered(model, streams, control)
                limits = [token_limit(model.config, _item(here[i]).seconds) for i in rows]
                for rates, written in model.write_all(encoded, scales, limits).items():
                    texts = found.setdefault((number, rates), {})
                    texts |= {i: model.text_of(w.ids) for i, w in zip(rows, written, strict=True)}
        truth = [clip.text for clip in clips]
        for (number, rates), texts in found.items():
            said = [texts[i] for i in range(len(clips))]
            errors = word_errors(truth, said, unpunctuated), character_errors(truth, said, unpunctuated)
            out.append(Heard(models[number][0], rates, snr, control, *errors, _tokens(clips, rates)))
    return out


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tokenthrift evaluate mtsk", description="Errors against tokens.")
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]MODEL", help="may be repeated")
    base = "independent model of the finest pair of rates, to be pooled without training"
    parser.add_argument("--pool", metavar="MODEL", help=base)
    sets_help = "folder of a manifest.jsonl; sets named synthetic... are also taken together"
    parser.add_argument("--data", action="append", required=True, metavar="[NAME=]DIR", help=sets_help)
    parser.add_argument("--babble", metavar="FILE", help="noise for the levels of --snr")
    parser.add_argument("--snr", nargs="+", default=["clean", "10", "5", "0", "-5"], help="dB, or clean")
    parser.add_argument("--limit", type=int, help="most items of a set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    kept = "save the first model here, with what was measured as the table its budgets choose by; development data only"
    parser.add_argument("--table", type=Path, metavar="FOLDER", help=kept)
    arguments = parser.parse_args(argv)
    try:
        snrs = [None if level == "clean" else float(level) for level in arguments.snr]
    except ValueError as error:
        parser.error(f"--snr: {error}")
    given = [(name or Path(path).name, path) for name, path in map(_named, arguments.data)]
    if len({name for name, _ in given}) < len(given):
        parser.error("--data: two sets have one name; tell them apart with NAME=DIR")
    if not arguments.babble:
        snrs = [None]
    models = [(name or "model", LlamaMTSK.from_pretrained(path)) for name, path in map(_named, arguments.model)]
    if arguments.pool:
        rates = models[0][1].config
        finest = LlamaMTSK.from_pretrained(arguments.pool)
        models.append((POOLED, pooled(finest, rates.audio_rates, rates.video_rates)))
    babble = read_audio(arguments.babble) if arguments.babble else None
    sets: dict[str, tuple[list[Clip], list[Heard], str]] = {}
    skipped: list[str] = []
    for name, path in given:
        clips, wrong = readable(ManifestClips(Path(path) / "manifest.jsonl"), arguments.limit)
        skipped += [f"{name}, left out: {what}" for what in wrong]
        print(*skipped[len(skipped) - len(wrong) :], sep="\n", end="\n" if wrong else "", file=sys.stderr)
        rows = evaluate(models, clips, babble, snrs, seed=arguments.seed)
        sets[name] = clips, rows, _homophenes(Path(path))
        _keep(arguments.out / "rows.json", {name: rows for name, (_, rows, _) in sets.items()})
    tables: list[Table] = []
    figures = {}
    spent: list[Cost] = []
    first, model = models[0]
    for name, (clips, rows, note) in sets.items():
        tables += _results(name, clips, rows, snrs, note)
        found = costs(model, _middle(clips))
        spent += found
        tables.append(cost_table(f"{name}: cost of one item of middle length", found))
        figures[f"errors_{name}"] = error_plot(rows, snrs)
    synthetic = {name: own for name, own in sets.items() if name.startswith(TOGETHER)}
    if len(synthetic) > 1:
        clips = [clip for own, _, _ in synthetic.values() for clip in own]
        rows = together([(rows, len(own)) for own, rows, _ in synthetic.values()])
        note = f"All errors of {', '.join(synthetic)} over all their words."
        tables += _results("all synthetic sets", clips, rows, snrs, note)
    if arguments.table is not None:
        everything = [row for _, rows, _ in sets.values() for row in rows]
        model.config = replace(model.config, table=measured(everything, first, _milliseconds(spent)))
        model.save_pretrained(arguments.table, dtype=torch.float16)
    settings: Mapping[str, Cell] = {
        "command": f"tokenthrift evaluate mtsk {' '.join(argv)}",
        "models": ", ".join(arguments.model),
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
        notes=[SYNTHETIC, *skipped],
    )
    print(f"{arguments.out}/report.md", file=sys.stderr)
    return 0


def _results(
    name: str, clips: Sequence[Clip], rows: Sequence[Heard], snrs: Sequence[float | None], note: str
) -> list[Table]:
    """Errors, controls and promises of one set, printed too."""
    words = sum(len(clip.text.split()) for clip in clips)
    more = [control_table(f"{name}: controls", rows)]
    for many in dict.fromkeys(r.model for r in rows if r.model not in (INDEPENDENT, POOLED)):
        more.append(promises(f"{name}: what was promised of {many}", rows, many))
    errors = error_table(f"{name}: {len(clips)} items, {words} words", rows, snrs, note)
    tables = [errors, *(table for table in more if table is not None)]
    for table in tables:
        print(table.to_markdown(), end="\n\n", flush=True)
    return tables


def _has(clips: Sequence[Clip], stream: str) -> bool:
    """Whether the clips of a set have a stream."""
    count = sum(getattr(clip, stream) is not None for clip in clips)
    if 0 < count < len(clips):
        raise ValueError(f"{count} of {len(clips)} clips have {stream}; make a set of those that have it, and one more")
    return count > 0


def _offered(model: LlamaMTSK, streams: tuple[bool, bool], control: str) -> list[Rates]:
    """The scales that a set has the streams for; with a control only those that take both."""
    fitting = [r for r in model.config.scales if (streams[0] or not r.audio) and (streams[1] or not r.video)]
    return [r for r in fitting if not control or (r.audio and r.video)]


def _item(clip: Clip) -> Item:
    return Item(clip.audio, clip.video)


def _tokens(clips: Sequence[Clip], rates: Rates) -> float:
    return sum(price(rates, item.states, item.frames) for item in map(_item, clips)) / len(clips)


def _middle(clips: Sequence[Clip]) -> Clip:
    return sorted(clips, key=lambda clip: _item(clip).seconds)[len(clips) // 2]


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


def _keep(path: Path, sets: Mapping[str, Sequence[Heard]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"set": name, **asdict(row)} for name, own in sets.items() for row in own]
    whole = path.with_name(f".{path.name}.part")
    whole.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    os.replace(whole, path)


def _same_encoders(one: LlamaMTSK, other: LlamaMTSK) -> bool:
    for name in ("audio_encoder", "video_encoder"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if (ours is None) != (theirs is None):
            return False
        if ours is not None:
            a, b = ours.state_dict(), theirs.state_dict()
            if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
                return False
    return True


def _named(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals else ("", given)
