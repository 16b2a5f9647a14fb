"""`--report`: a page of results that needs nothing but itself: no network, no other file but the recordings it plays.

Every recording has a row with its waveform, a player, its words colored by their confidence (a click plays from there),
seconds, tokens, rounds, and where it is known what was said: word and character error rates and the errors themselves.
Columns sort by a click. All text is escaped, and a content security policy forbids anything from elsewhere, so that
neither a file's name nor a transcript can put a program on the page.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from tokenthrift import extras
from tokenthrift.jobs.journal import write_bytes
from tokenthrift.transcription.results import FileTranscript
from tokenthrift.transcription.writers import printable

if TYPE_CHECKING:
    from tokenthrift.transcription.references import References

__all__ = ["page_entry", "page_entry_of_row", "waveform", "write_page"]

_BINS: Final = 160
_RATE: Final = 4_000
_COLUMNS: Final = (
    "recording",
    "status",
    "seconds",
    "native",
    "cap",
    "used",
    "written",
    "rounds",
    "spent",
    "confidence",
    "WER",
    "CER",
)

_STYLE: Final = """
:root{color-scheme:light dark;--line:#8884;--soft:#888}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem}
table{border-collapse:collapse;width:100%}
th{cursor:pointer;text-align:left;border-bottom:2px solid var(--line);padding:.3rem .5rem;white-space:nowrap}
th[aria-sort=ascending]::after{content:" \\25B2"}th[aria-sort=descending]::after{content:" \\25BC"}
td{padding:.3rem .5rem;vertical-align:top}
tbody{border-bottom:1px solid var(--line)}
td.n{text-align:right;font-variant-numeric:tabular-nums}
svg{width:20rem;height:2.6rem;display:block}svg path{stroke:#48a;stroke-width:1}
audio{width:20rem;height:2rem}
.w{border-radius:3px;padding:0 1px;cursor:pointer}
.failed{color:#c33}.silent{color:var(--soft)}
del{background:#e664}ins{background:#6c64;text-decoration:none}
.name{word-break:break-all;font-weight:600}
p.sum{color:var(--soft)}
"""

_SCRIPT: Final = """
const table = document.querySelector('table');
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const up = head.getAttribute('aria-sort') !== 'ascending';
  document.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = body => body.rows[0].cells[column].dataset.key;
  const bodies = [...table.tBodies].sort((a, b) => {
    const x = key(a), y = key(b), n = Number(x) - Number(y);
    return (x === '') - (y === '') || (up ? 1 : -1) * (Number.isNaN(n) ? x.localeCompare(y) : n);
  });
  bodies.forEach(body => table.append(body));
}));
document.addEventListener('click', event => {
  const start = event.target.dataset && event.target.dataset.start;
  const player = start && event.target.closest('tbody').querySelector('audio');
  if (player) { player.currentTime = Number(start); player.play(); }
});
"""


def page_entry(index: int, result: FileTranscript, references: References | None) -> dict[str, Any]:
    """What the page shows of a result; plain data.

    Args:
        index: its number among the inputs, from 0.
        result: of a recording.
        references: what was said, where that is known.
    """
    # The player has the whole file, of which a part may have been transcribed.
    words = [[word.text, round(word.confidence, 3), round(word.start + result.offset, 2)] for word in result.words]
    if len(words) < len(result.text.split()):
        words = [
            [text, round(segment.confidence, 3), round(segment.start + result.offset, 2)]
            for segment in result.segments
            for text in segment.text.split()
        ]
    said = references.said(result) if references is not None else result.reference
    return {
        "index": index,
        "file": printable(result.path),
        "source": _source(result.path),
        "status": result.status,
        "error": printable(result.error or ""),
        "seconds": result.seconds,
        "native": result.usage.native,
        "cap": result.usage.cap,
        "used": result.usage.used,
        "written": result.new_tokens,
        "rounds": result.usage.rounds,
        "spent": result.seconds_spent,
        "confidence": result.confidence if result.segments else None,
        "words": words,
        "peaks": [] if result.error is not None else waveform(result.path),
        **_errors(said, result.text if result.error is None else None),
    }


def page_entry_of_row(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a recording that was done before, of which only the manifest's row is known."""
    text = str(row.get("pred_text", ""))
    confidence = row.get("confidence")
    return {
        "index": index,
        "file": str(row["audio_filepath"]),
        "source": _source(Path(str(row["audio_filepath"]))),
        "status": str(row.get("status", "completed")),
        "error": "",
        "seconds": float(row.get("duration", 0)),
        "native": int(row.get("native", 0)),
        "cap": int(row.get("cap", 0)),
        "used": int(row.get("tokens", 0)),
        "written": int(row.get("new_tokens", 0)),
        "rounds": int(row.get("rounds", 0)),
        "spent": 0.0,
        "confidence": confidence if text else None,
        "words": [[word, confidence, None] for word in text.split()],
        "peaks": waveform(Path(str(row["audio_filepath"]))),
        **_errors(row.get("text"), text),
    }


def waveform(path: Path) -> list[float]:
    """The largest samples of 160 equal parts of a recording, 0 to 1; nothing for one that cannot be read."""
    import numpy as np

    from tokenthrift.media.audio import AudioError, stream_samples

    peaks: list[float] = []
    step = _RATE // 20
    try:
        for block in stream_samples(path, _RATE, notes=[]):
            peaks += np.maximum.reduceat(np.abs(block), range(0, len(block), step)).tolist()
    except (AudioError, OSError, ImportError):
        return []
    loudest = max([*peaks, 1e-6])
    edges = [round(i * len(peaks) / _BINS) for i in range(_BINS + 1)]
    return [round(max(peaks[a : max(b, a + 1)] or [0.0]) / loudest, 3) for a, b in zip(edges, edges[1:], strict=False)]


def write_page(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes the page whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    entries = list(entries)
    seconds = sum(entry["seconds"] for entry in entries)
    counts = ", ".join(
        f"{sum(entry['status'] == status for entry in entries)} {status}"
        for status in ("completed", "no speech", "failed")
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    rows = "\n".join(_rows(entry) for entry in entries)
    policy = "default-src 'none'; media-src 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Transcripts</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{_STYLE}</style></head><body>
<h1>Transcripts</h1>
<p class="sum">{len(entries)} recordings, {seconds / 60:.1f} minutes: {counts}</p>
<table><thead><tr>{heads}</tr></thead>
{rows}
</table>
<script>{_SCRIPT}</script></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8", errors="replace"))


def _rows(entry: Mapping[str, Any]) -> str:
    kind = {"failed": "failed", "no speech": "silent"}.get(entry["status"], "")
    cells = [f'<td class="name" data-key="{_text(entry["file"])}">{_text(entry["file"])}</td>']
    cells.append(f'<td class="{kind}" data-key="{_text(entry["status"])}">{_text(entry["status"])}</td>')
    cells.append(_number(entry["seconds"], "{:.1f}"))
    cells += [_number(entry[name], "{}") for name in ("native", "cap", "used", "written", "rounds")]
    cells.append(_number(entry["spent"], "{:.2f}"))
    cells.append(_number(entry["confidence"], "{:.2f}"))
    cells += [_number(entry[name], "{:.1%}") for name in ("wer", "cer")]
    picture = _waveform(entry["peaks"])
    player = f'<audio controls preload="none" src="{_text(entry["source"])}"></audio>' if entry["peaks"] else ""
    words = " ".join(_word(*word) for word in entry["words"]) or f'<span class="{kind}">{_text(entry["error"])}</span>'
    errors = f'<p class="errors">{_difference(entry["difference"])}</p>' if entry["difference"] else ""
    detail = f'<tr><td>{picture}{player}</td><td colspan="{len(_COLUMNS) - 1}">{words}{errors}</td></tr>'
    return f"<tbody><tr>{''.join(cells)}</tr>{detail}</tbody>"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="n" data-key=""></td>'
    return f'<td class="n" data-key="{float(value):.6g}">{form.format(value)}</td>'


def _word(text: str, confidence: float, start: float | None) -> str:
    """From red where the model was not sure to nothing where it was."""
    strength = max(0.0, min(1.0, 1 - float(confidence)))
    seek = "" if start is None else f' data-start="{start}"'
    style = f"background:rgba(230,80,60,{strength:.2f})"
    return f'<span class="w" style="{style}" title="{float(confidence):.2f}"{seek}>{_text(text)}</span>'


def _waveform(peaks: list[float]) -> str:
    if not peaks:
        return ""
    path = "".join(f"M{2 * i + 1} {20 - 19 * peak:.1f}V{20 + 19 * peak:.1f}" for i, peak in enumerate(peaks))
    return f'<svg viewBox="0 0 {2 * len(peaks)} 40" preserveAspectRatio="none" role="img"><path d="{path}"/></svg>'


def _difference(parts: list[list[str]]) -> str:
    shown = []
    for said, written in parts:
        if said == written:
            shown.append(_text(said))
        else:
            shown += [f"<del>{_text(said)}</del>"] if said else []
            shown += [f"<ins>{_text(written)}</ins>"] if written else []
    return " ".join(shown)


def _errors(said: str | None, written: str | None) -> dict[str, Any]:
    """Error rates, and what was said beside what was written, part by part."""
    if said is None or written is None:
        return {"wer": None, "cer": None, "difference": []}
    from tokenthrift.evaluation.wer import character_errors, normalize_english, word_errors

    wer, cer = word_errors([said], [written]).rate, character_errors([said], [written]).rate
    out = extras.require("jiwer").process_words(normalize_english(said) or "", normalize_english(written))
    difference = [
        [
            " ".join(out.references[0][part.ref_start_idx : part.ref_end_idx]),
            " ".join(out.hypotheses[0][part.hyp_start_idx : part.hyp_end_idx]),
        ]
        for part in out.alignments[0]
    ]
    finite = {"wer": wer, "cer": cer}
    return {**{k: v if v != float("inf") else 1.0 for k, v in finite.items()}, "difference": difference}


def _source(path: Path) -> str:
    return "file://" + quote(os.fsencode(os.path.abspath(path)))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
