"""`tokenthrift evaluate mtsk`: errors against tokens for every pair of rates, with noise, controls and costs.

    tokenthrift evaluate mtsk --model MS=model_cards/mtsk-tiny-en --model independent=A --model independent=B \\
        --pool A --data synthetic=speech/test/grid --babble speech/babble/test.flac --out report

Source: the tables of Llama-MTSK (arXiv 2503.06362): one model against one model per pair of rates, against pooling
without training, and babble. What differs: 0 dB is 0 dB and counts where there is speech; every model hears the same
noise; shuffled, still and muted streams show what the lips are worth; the FLOPs of encoders and decoding are counted
beside those of the prefix. Sets are never mixed: each has tables of its own under its name.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift.evaluation.report import Cell, Table, new_figure, write_report
from tokenthrift.evaluation.wer import ErrorCount, character_errors, word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk.augmentation import mix
from tokenthrift.mtsk.avhubert import FRAME_RATE
from tokenthrift.mtsk.cost import cost_table
from tokenthrift.mtsk.data import Clip, ManifestClips
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.module import carried_over
from tokenthrift.mtsk.rates import Measured, Rates, price
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.whisper import SAMPLE_RATE, states_of

__all__ = ["CONTROLS", "Heard", "conditions", "evaluate", "main", "measured", "pooled", "promises", "spoilt"]

CONTROLS = ("shuffled video", "still video", "muted audio")
SYNTHETIC = "Synthetic sets: rendered mouths and text-to-speech voices; no figure of theirs compares with one of LRS."


@dataclass(frozen=True, slots=True)
class Heard:
    """What one model wrote of one set in one condition at one pair of rates.

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


def spoilt(clips: Sequence[Clip], control: str) -> list[Clip]:
    """The clips with one stream made useless, or as they are where there is no control.

    Args:
        clips: with both streams, at least two for a shuffle.
        control: `shuffled video` gives every clip the lips of another, `still video` repeats its first frame, `muted
            audio` leaves silence.
    """
    if control == "shuffled video":
        half = len(clips) // 2
        return [replace(clip, video=clips[(i + half) % len(clips)].video) for i, clip in enumerate(clips)]
    out = []
    for clip in clips:
        audio, video = clip.audio, clip.video
        if control == "still video" and video is not None:
            video = video[:1].expand_as(video)
        if control == "muted audio" and audio is not None:
            audio = torch.zeros_like(audio)
        out.append(replace(clip, audio=audio, video=video))
    return out


def noisy(clips: Sequence[Clip], babble: Tensor, snr: float | None, seed: int) -> list[Clip]:
    """The clips with babble at a level; the noise of a clip depends on its place and the seed alone."""
    if snr is None:
        return list(clips)
    out = []
    for i, clip in enumerate(clips):
        audio = clip.audio
        if audio is not None:
            start = random.Random(f"{seed}-{i}").randrange(max(1, len(babble) - len(audio)))
            audio = mix(audio, babble[start : start + len(audio)], snr)
        out.append(replace(clip, audio=audio))
    return out


def pooled(model: LlamaMTSK, audio_rates: Sequence[int], video_rates: Sequence[int]) -> LlamaMTSK:
    """A model at rates it was never trained for: the same projectors and adapters over coarser tokens."""
    config = replace(model.config, audio_rates=tuple(audio_rates), video_rates=tuple(video_rates), table=())
    if config.lora.strategy != "MS":
        raise ValueError("only a model with one adapter for all scales (MS) can be pooled without training")
    coarse = LlamaMTSK(config, model.tokenizer, model.home).eval()
    coarse.load_state_dict(carried_over(coarse, model.state_dict()))
    coarse.load_frozen()
    return coarse


def unpunctuated(text: str) -> str:
    """Lower case without punctuation, as the published figures are counted; apostrophes stay."""
    return " ".join(re.sub(r"[^\w' ]+", " ", text.lower()).split())


def conditions(snrs: Sequence[float | None], controls: bool) -> list[tuple[float | None, str]]:
    """(level, control) of every pass over a set.

    Controls are heard at 0 dB, or at the loudest babble where that is not asked for; muted audio in silence.
    """
    plain: list[tuple[float | None, str]] = [(snr, "") for snr in snrs]
    levels = [snr for snr in snrs if snr is not None]
    if not controls:
        return plain
    level = 0.0 if 0.0 in levels or not levels else min(levels)
    return plain + [(None if control == "muted audio" else level, control) for control in CONTROLS]


def batches(clips: Sequence[Clip], size: int = 16) -> Iterator[list[int]]:
    """Places of clips of like length."""
    order = sorted(range(len(clips)), key=lambda i: _seconds(clips[i]))
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
        ValueError: the encoders differ, or a level is asked for without noise.
    """
    first = models[0][1]
    for name, model in models[1:]:
        if not _same_encoders(first, model):
            raise ValueError(f"{name} has other encoders than {models[0][0]}; evaluate it on its own")
    streams = (all(c.audio is not None for c in clips), all(c.video is not None for c in clips))
    if not streams[0]:
        snrs = [None]
    if babble is None and any(snr is not None for snr in snrs):
        raise ValueError("levels of noise were asked for, but no noise was given")
    out = []
    lips: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # noise does not change what is seen
    for snr, control in conditions(snrs, controls=all(streams)):
        here = spoilt(clips, control)
        here = here if babble is None else noisy(here, babble, snr, seed)
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
                limits = [_limit(model, here[i]) for i in rows]
                for rates, written in model.write_all(encoded, scales, limits).items():
                    texts = found.setdefault((number, rates), {})
                    texts |= {i: model.text_of(w.ids) for i, w in zip(rows, written, strict=True)}
        truth = [clip.text for clip in clips]
        for (number, rates), texts in found.items():
            said = [texts[i] for i in range(len(clips))]
            errors = word_errors(truth, said, unpunctuated), character_errors(truth, said, unpunctuated)
            out.append(Heard(models[number][0], rates, snr, control, *errors, _tokens(clips, rates)))
    return out


def error_table(title: str, rows: Sequence[Heard], snrs: Sequence[float | None]) -> Table:
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
    return Table(
        title=title,
        columns=("model", "(audio, video) rates", "tokens per item", *columns),
        rows=tuple(lines),
        note="Rates are encoder states per token, 0 for a stream that is left out; errors in per cent of the corpus.",
    )


def control_table(title: str, rows: Sequence[Heard]) -> Table | None:
    """Word errors in per cent with a stream made useless, beside the same condition as it is."""
    spoilt_rows = [r for r in rows if r.control]
    plain = {(r.model, r.rates, r.snr): r for r in rows if not r.control}
    lines: list[tuple[Cell, ...]] = []
    for r in spoilt_rows:
        whole = plain.get((r.model, r.rates, r.snr))
        as_is = None if whole is None else 100 * whole.words.rate
        lines.append((r.model, str(r.rates), r.control, _level(r.snr), as_is, 100 * r.words.rate))
    columns = ("model", "(audio, video) rates", "control", "babble", "WER as it is", "WER")
    return Table(title=title, columns=columns, rows=tuple(lines)) if lines else None


def promises(title: str, rows: Sequence[Heard], name: str, snr: float = 0.0) -> Table | None:
    """What the design promises of one model for many rates, and what was measured, in points of WER.

    Args:
        title: of the table.
        rows: of one set; models named `independent` and `pooled` are what it is compared with.
        name: of the model.
        snr: level at which lips must help.
    """
    both = {(r.model, r.rates, r.snr, r.control): 100 * r.words.rate for r in rows}
    scales = sorted({r.rates for r in rows if r.model == name and r.rates.audio and r.rates.video}, key=_fineness)
    if not scales:
        return None
    fine, coarse = scales[0], scales[-1]
    lines: list[tuple[Cell, ...]] = []
    alone = [both.get(("independent", rates, None, "")) for rates in scales]
    if all(value is not None for value in alone):
        gap = sum(both[name, rates, None, ""] - (value or 0.0) for rates, value in zip(scales, alone, strict=True))
        lines.append(("worse than independent models, mean over rates", "at most 0.5", gap / len(scales)))
    heard, lips = (both.get((name, r, snr, "")) for r in (Rates(fine.audio, 0), fine))
    if heard and lips is not None:
        lines.append(
            (f"fewer errors than audio alone at {snr:g} dB, relative %", "at least 20", 100 * (1 - lips / heard))
        )
        other = both.get((name, fine, snr, "shuffled video"))
        if other is not None:
            lines.append(("the same with shuffled video", "at most 0", 100 * (1 - other / heard)))
    lines.append(
        (f"rise from {fine} to {coarse}", "below 3", both[name, coarse, None, ""] - both[name, fine, None, ""])
    )
    if ("pooled", coarse, None, "") in both and ("pooled", fine, None, "") in both:
        rise = both["pooled", coarse, None, ""] - both["pooled", fine, None, ""]
        lines.append(("the same, pooled without training", "above 10", rise))
    return Table(title=title, columns=("what", "wanted", f"measured of {name}"), rows=tuple(lines))


def measured(rows: Sequence[Heard], name: str) -> tuple[Measured, ...]:
    """The table from which a model's budgets choose its rates: word errors by pair and level, over all sets given."""
    counts: dict[tuple[Rates, float | None], ErrorCount] = {}
    for r in rows:
        if r.model == name and not r.control:
            counts[r.rates, r.snr] = counts.get((r.rates, r.snr), ErrorCount()) + r.words
    return tuple(
        Measured(audio=rates.audio, video=rates.video, wer=round(count.rate, 5), snr=snr)
        for (rates, snr), count in counts.items()
    )


def error_plot(rows: Sequence[Heard], snrs: Sequence[float | None]) -> Any:
    """Word errors against tokens, a panel for clean audio and one for the loudest babble."""
    levels = list(dict.fromkeys([snrs[0], snrs[-1]]))
    figure, axes = new_figure(9.0, 4.0, ncols=len(levels), squeeze=False)
    for panel, snr in zip(axes[0], levels, strict=True):
        here = [r for r in rows if r.snr == snr and not r.control]
        for model in dict.fromkeys(r.model for r in here):
            points = sorted((r.tokens, 100 * r.words.rate) for r in here if r.model == model)
            panel.plot(*zip(*points, strict=True), marker="o", label=model)
        panel.set(xlabel="tokens per item", ylabel="WER, %", title=_level(snr))
        panel.legend()
    return figure


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tokenthrift evaluate mtsk", description="Errors against tokens.")
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]MODEL", help="may be repeated")
    parser.add_argument("--pool", metavar="MODEL", help="model of one pair of rates, to be pooled without training")
    parser.add_argument(
        "--data", action="append", required=True, metavar="[NAME=]DIR", help="folder of a manifest.jsonl"
    )
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
    if not arguments.babble:
        snrs = [None]
    models = [(name or "model", LlamaMTSK.from_pretrained(path)) for name, path in map(_named, arguments.model)]
    if arguments.pool:
        rates = models[0][1].config
        base = LlamaMTSK.from_pretrained(arguments.pool)
        models.append(("pooled", pooled(base, rates.audio_rates, rates.video_rates)))
    babble = read_audio(arguments.babble) if arguments.babble else None
    tables: list[Table] = []
    figures = {}
    everything: list[Heard] = []
    for given in arguments.data:
        name, path = _named(given)
        name = name or Path(path).name
        data = ManifestClips(Path(path) / "manifest.jsonl")
        clips = [data[i] for i in range(min(len(data), arguments.limit or len(data)))]
        rows = evaluate(models, clips, babble, snrs, seed=arguments.seed)
        everything += rows
        words = sum(len(clip.text.split()) for clip in clips)
        tables.append(error_table(f"{name}: {len(clips)} items, {words} words", rows, snrs))
        main_name = models[0][0]
        more = [control_table(f"{name}: controls", rows), promises(f"{name}: what was promised", rows, main_name)]
        tables += [table for table in more if table is not None]
        tables.append(cost_table(f"{name}: cost of one item of middle length", models[0][1], _middle(clips)))
        figures[f"errors_{name}"] = error_plot(rows, snrs)
        print(tables[-len([t for t in more if t]) - 2].to_markdown(), flush=True)
    if arguments.table is not None:
        name, model = models[0]
        model.config = replace(model.config, table=measured(everything, name))
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
        notes=[SYNTHETIC],
    )
    print(f"{arguments.out}/report.md", file=sys.stderr)
    return 0


def _offered(model: LlamaMTSK, streams: tuple[bool, bool], control: str) -> list[Rates]:
    """The scales that a set has the streams for; with a control only those that take both."""
    fitting = [r for r in model.config.scales if (streams[0] or not r.audio) and (streams[1] or not r.video)]
    return [r for r in fitting if not control or (r.audio and r.video)]


def _limit(model: LlamaMTSK, clip: Clip) -> int:
    decode = model.config.decode
    return min(decode.max_new_tokens, int(16 + decode.tokens_per_second * _seconds(clip)))


def _seconds(clip: Clip) -> float:
    if clip.audio is not None:
        return len(clip.audio) / SAMPLE_RATE
    return 0.0 if clip.video is None else len(clip.video) / FRAME_RATE


def _tokens(clips: Sequence[Clip], rates: Rates) -> float:
    lengths = [
        (0 if c.audio is None else states_of(len(c.audio)), 0 if c.video is None else len(c.video)) for c in clips
    ]
    return sum(price(rates, *length) for length in lengths) / len(clips)


def _middle(clips: Sequence[Clip]) -> Clip:
    return sorted(clips, key=_seconds)[len(clips) // 2]


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


def _fineness(rates: Rates) -> tuple[int, int]:
    return rates.audio, rates.video


def _level(snr: float | None) -> str:
    return "clean" if snr is None else f"{snr:g} dB"
