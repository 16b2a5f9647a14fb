"""The batch job against faster-whisper and transformers' pipeline on the same files: time, memory, WER, losses.

    python benchmarks/transcription.py --clips samples/speech --whisper FOLDER --dllm model_cards/dllm-asr-tiny-en \
        --short 1000 --long 10 --hours 1 --out results/transcription

`--clips` is a folder with recordings and their `manifest.jsonl`; FOLDER holds a Whisper of transformers (safetensors
and tokenizer.json), which is converted to CTranslate2 once. Short files are the clips over and over, long ones of three
minutes and of hours are made by joining clips with half a second of silence. Each system runs in a process of its own
with `--threads` threads; its seconds include loading the model, CPU seconds are those of the process and its children,
memory is the largest resident set. transformers' pipeline gets samples in place of files, as it would need the program
ffmpeg to read them. The second table gives every system the same twelve broken or odd files.

Every row is kept below `--out` and not run again by a later call, so that a table can be made in pieces (`--again`).

`--memory` measures the job alone: largest resident set over 10, 100 and 1,000 files and over one file of six hours,
with dLLM-ASR and with no model at all, which does all but recognize.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tokenthrift.budget import BudgetSupport, TokenUsage
from tokenthrift.transcript import Transcript

ROOT = Path(__file__).parents[1]
SYSTEMS = (
    "dllm-asr",
    "whisper-job",
    "whisper-job ctranslate2 fp32",
    "whisper-job ctranslate2 int8",
    "faster-whisper fp32",
    "faster-whisper int8",
    "faster-whisper batched",
    "pipeline",
)
NO_MODEL = "job without a model"
RATE = 16_000
COUNTS = (10, 100, 1000)


def main() -> None:
    """Makes the files, runs every system in a process of its own and prints the tables."""
    arguments = _parser().parse_args()
    if arguments.child is not None:
        _child(arguments)
        return
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    clips = _clips(arguments.clips)
    if arguments.memory:
        _memory(arguments, clips)
        return
    sets = {
        f"{arguments.short} short": _short(clips, out / "short", arguments.short),
        f"{arguments.long} of 3 min": _joined(clips, out / "long", arguments.long, 180.0),
        f"one of {arguments.hours:g} h": _joined(clips, out / "hour", 1, 3600.0 * arguments.hours),
    }
    systems = [system for system in SYSTEMS if arguments.only is None or system in arguments.only]
    rows = []
    for name, files in sets.items():
        if not files:
            continue
        seconds = sum(soundfile.info(path).duration for path in files)
        for system in systems:
            found = _kept(arguments, name, system, files)
            wer = _wer([_said(path) for path in files], [found["texts"].get(str(path), "") for path in files])
            lost = sum(str(path) not in found["texts"] for path in files)
            rows.append([name, f"{seconds:.0f}", system, *(f"{found[k]:.1f}" for k in ("cpu", "wall")),
                         f"{found['memory'] / 1024:.0f}", f"{100 * wer:.1f}", str(lost)])  # fmt: skip
            print("|", " | ".join(rows[-1]), "|", flush=True)
    table = _table(["files", "seconds", "system", "CPU s", "wall s", "MB", "WER %", "lost"], rows)
    odd = _odd(clips, out / "odd")
    results = {system: _kept(arguments, "odd", system, list(odd.values())) for system in systems}
    lines = [
        [
            kind,
            *(
                _shown(results[system]["texts"].get(str(path)), results[system]["errors"].get(str(path)))
                for system in systems
            ),
        ]
        for kind, path in odd.items()
    ]
    table += "\n\n" + _table(["file", *systems], lines)
    (out / "table.md").write_text(table + "\n")
    print(table)


def _child(arguments: argparse.Namespace) -> None:
    """Transcribes the files of a list with one system; writes texts, errors and what it took."""
    files = json.loads(arguments.list.read_text())
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    began = time.perf_counter()
    try:
        _system(arguments, files, texts, errors)
    except Exception as error:  # What a system does with a bad file is what the second table is about.
        errors["*"] = f"{type(error).__name__}: {error}"
    use, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = use.ru_utime + use.ru_stime + children.ru_utime + children.ru_stime
    data = {"texts": texts, "errors": errors, "cpu": cpu, "wall": time.perf_counter() - began, "memory": _peak()}
    arguments.result.write_text(json.dumps(data))


def _peak() -> int:
    """Largest resident set of this process in KiB; that of getrusage may be from before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _system(arguments: argparse.Namespace, files: list[str], texts: dict[str, str], errors: dict[str, str]) -> None:
    name: str = arguments.child
    if name in ("dllm-asr", NO_MODEL) or name.startswith("whisper-job"):
        from tokenthrift.transcription import Transcriber, load_recognizer

        model: Any
        if "ctranslate2" in name:
            precision = "int8" if name.endswith("int8") else "float32"
            model = load_recognizer(_converted(arguments), precision=precision, threads=arguments.threads)
        elif name == NO_MODEL:
            model = NoModel()
        else:
            import torch

            torch.set_num_threads(arguments.threads)
            model = load_recognizer(arguments.dllm if name == "dllm-asr" else arguments.whisper)
        for result in Transcriber(model).run(files):
            if result.error is None:
                texts[str(result.path)] = result.text
            else:
                errors[str(result.path)] = result.error
        return
    if name == "pipeline":
        import torch
        from transformers import pipeline

        torch.set_num_threads(arguments.threads)
        pipe: Any = pipeline("automatic-speech-recognition", model=str(arguments.whisper), chunk_length_s=30)
        if pipe.tokenizer.pad_token_id is None:
            pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
        for path in files:
            _one(path, texts, errors, lambda path: str(pipe(_samples(path), batch_size=8)["text"]))
        return
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    kind = "float32" if name.endswith("fp32") else "int8"
    whisper = WhisperModel(str(_converted(arguments)), device="cpu", compute_type=kind, cpu_threads=arguments.threads)
    batched = BatchedInferencePipeline(whisper) if name.endswith("batched") else None

    def listen(path: str) -> str:
        if batched is not None:
            return " ".join(segment.text for segment in batched.transcribe(path, batch_size=8, language="en")[0])
        options = {"beam_size": 1, "language": "en", "condition_on_previous_text": False}
        return " ".join(segment.text for segment in whisper.transcribe(path, **options)[0])

    for path in files:
        _one(path, texts, errors, listen)


class NoModel:
    """A recognizer that writes nothing: what is left is the cost of the job."""

    support = BudgetSupport(fields=frozenset())
    sample_rate, max_seconds, takes_arrays = RATE, 30.0, True

    def plan(self, items: Any, budget: Any = None) -> tuple[TokenUsage, ...]:
        """Nothing."""
        return tuple(TokenUsage(native=0, cap=0, used=0) for _ in items)

    def transcribe(self, audio: Any, budget: Any = None, decode: Any = None) -> list[Transcript]:
        """Empty texts."""
        return [Transcript("", (), usage) for usage in self.plan(audio)]


def _samples(path: str) -> dict[str, Any]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return {"raw": samples.mean(1), "sampling_rate": rate}


def _one(path: str, texts: dict[str, str], errors: dict[str, str], listen: Callable[[str], str]) -> None:
    """With the loop that a user has to write around systems of one file."""
    try:
        texts[path] = listen(path).strip()
    except Exception as error:
        errors[path] = f"{type(error).__name__}: {error}"


def _converted(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.out / f"ctranslate2-{arguments.whisper.name}"
    if not (folder / "model.bin").is_file():
        from ctranslate2.converters import TransformersConverter

        copies = ["tokenizer.json", "preprocessor_config.json"]
        present = [name for name in copies if (Path(arguments.whisper) / name).is_file()]
        TransformersConverter(str(arguments.whisper), copy_files=present).convert(str(folder), force=True)
    return folder


def _kept(arguments: argparse.Namespace, name: str, system: str, files: list[Path]) -> dict[str, Any]:
    """A row that an earlier call has run with the same weights, or else `_run`, whose crashes are not kept."""
    weights = {"dllm-asr": arguments.dllm, NO_MODEL: ""}.get(system, arguments.whisper)
    row = f"{name}, {system}, {Path(weights or '').name}, {arguments.threads} threads"
    path = arguments.out / "rows" / f"{row}.json".replace(" ", "_")
    if not arguments.again and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    found = _run(arguments, system, files)
    if found["memory"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def _run(arguments: argparse.Namespace, system: str, files: list[Path]) -> dict[str, Any]:
    listing, result = arguments.out / "list.json", arguments.out / "result.json"
    listing.write_text(json.dumps([str(path) for path in files]))
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", system, "--list", str(listing), "--result", str(result)]
    command += ["--whisper", str(arguments.whisper), "--dllm", str(arguments.dllm), "--out", str(arguments.out)]
    threads = str(arguments.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    if system.startswith("faster-whisper") or "ctranslate2" in system:
        _converted(arguments)
    done = subprocess.run([*command, "--threads", threads], env=environment, capture_output=True, text=True)
    if not result.is_file():
        ended = f"the process ended with {done.returncode}"
        return {"texts": {}, "errors": {"*": ended}, "cpu": 0.0, "wall": 0.0, "memory": 0}
    data: dict[str, Any] = json.loads(result.read_text())
    return data


def _memory(arguments: argparse.Namespace, clips: list[tuple[Path, str]]) -> None:
    rows = []
    for name, count in (*((f"{count} short", count) for count in COUNTS), ("one of 6 h", 0)):
        files = _short(clips, arguments.out / "short", count)
        files = files or _joined(clips, arguments.out / "six", 1, 6 * 3600.0)
        for system in arguments.only or [NO_MODEL, "dllm-asr"]:
            found = _kept(arguments, f"memory {name}", system, files)
            done = len(found["texts"])
            rows.append([name, system, f"{found['memory'] / 1024:.0f}", f"{found['cpu']:.0f}", str(done)])
            print("|", " | ".join(rows[-1]), "|", flush=True)
    print(_table(["files", "system", "MB", "CPU s", "done"], rows))


def _clips(folder: Path) -> list[tuple[Path, str]]:
    lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return [(folder / line["audio_filepath"], line["text"]) for line in lines]


def _short(clips: list[tuple[Path, str]], folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        source, text = clips[i % len(clips)]
        path = folder / f"{i:05}{source.suffix}"
        if not path.exists():
            os.link(source, path) if source.stat().st_dev == folder.stat().st_dev else path.write_bytes(
                source.read_bytes()
            )
        path.with_suffix(".said").write_text(text)
        paths.append(path)
    return paths


def _joined(clips: list[tuple[Path, str]], folder: Path, count: int, seconds: float) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count if seconds else 0):
        path, said, length, i = folder / f"{number:03}.flac", [], 0, number * 7
        if path.with_suffix(".said").is_file() and abs(soundfile.info(path).duration - seconds) < 60:
            paths.append(path)
            continue
        with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
            while length < seconds * RATE:
                source, text = clips[i % len(clips)]
                samples, rate = soundfile.read(source, dtype="float32")
                step = rate / RATE
                samples = np.interp(np.arange(0, len(samples), step), np.arange(len(samples)), samples)
                samples = np.concatenate([samples, np.zeros(RATE // 2)])
                file.write(samples)
                said.append(text)
                length, i = length + len(samples), i + 1
        path.with_suffix(".said").write_text(" ".join(said))
        paths.append(path)
    return paths


def _odd(clips: list[tuple[Path, str]], folder: Path) -> dict[str, Path]:
    """Twelve files that a folder of recordings may hold."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, rate = soundfile.read(clips[0][0], dtype="float32")
    good = clips[0][0].read_bytes()
    noise = np.random.default_rng(0).normal(0, 0.02, 5 * RATE).astype(np.float32)

    def wav(name: str, data: Any, rate: int = rate, **options: Any) -> Path:
        soundfile.write(folder / name, data, rate, **options)
        return folder / name

    def raw(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    whole = wav("whole.wav", samples).read_bytes()
    return {
        "empty": raw("empty.wav", b""),
        "text called wav": raw("text.wav", b"this is no sound"),
        "cut in half": raw("cut.wav", whole[: len(whole) // 2]),
        "flac cut in half": raw("cut.flac", good[: len(good) // 2]),
        "NaN samples": wav("nan.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT"),
        "no samples": wav("none.wav", np.zeros(0, np.float32)),
        "silence": wav("silence.wav", np.zeros(5 * RATE, np.float32), RATE),
        "noise": wav("noise.wav", noise, RATE),
        "flac called mp3": raw("wrong.mp3", good),
        "stereo, one side mute": wav("stereo.wav", np.stack([samples, 0 * samples], 1)),
        "channels cancel": wav("cancel.wav", np.stack([samples, -samples], 1)),
        "50 ms": wav("tiny.wav", samples[: rate // 20]),
    }


def _said(path: Path) -> str:
    return path.with_suffix(".said").read_text()


def _wer(said: list[str], written: list[str]) -> float:
    from tokenthrift.evaluation.wer import word_errors

    return word_errors(said, written).rate


def _shown(text: str | None, error: str | None) -> str:
    if text is None:
        return f"error: {error[:40]}" if error else "lost, no word of it"
    return f"“{text[:30]}”" if text else "empty text"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [
        "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in [heads, *rows]
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(heads), *lines[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / "samples" / "speech")
    parser.add_argument("--whisper", type=Path, help="folder of a Whisper of transformers")
    parser.add_argument("--dllm", default=str(ROOT / "model_cards" / "dllm-asr-tiny-en"))
    parser.add_argument("--short", type=int, default=1000, help="short files (default: 1000)")
    parser.add_argument("--long", type=int, default=10, help="files of three minutes (default: 10)")
    parser.add_argument("--hours", type=float, default=1.0, help="length of the longest file (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=(*SYSTEMS, NO_MODEL), help="run these systems")
    parser.add_argument("--again", action="store_true", help="run rows again that an earlier call has run")
    parser.add_argument("--memory", action="store_true", help="measure the memory of the job instead")
    parser.add_argument("--out", type=Path, default=Path("results/transcription"))
    for name in ("child", "list", "result"):
        parser.add_argument(f"--{name}", type=str if name == "child" else Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
