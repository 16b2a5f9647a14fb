"""dLLM-ASR against its parts and its baselines, in one run: `python benchmarks/dllm_asr.py --json out.json`.

Every system reads the same recordings, one at a time, with the same number of threads: the CTC draft alone; the
certified text; the diffusion model without draft, with all words of the draft open, with its sure words kept, by the
model's own settings, with and without pruning, with the gate (a draft that is sure everywhere stays), and with an
encoder that always reads 30 s; the same weights left to right, and with `--baseline` another decoder over the same
encoder and adapter, both with a key-value cache and stopped at the length guard of the draft; the draft, the certified
text and the left-to-right one with linear layers in 8 bits; diffusion from noise in fixed steps, a token a step over
128 slots; Whisper tiny.en, on 30 s of padded audio as it needs, through transformers and through faster-whisper in fp32
and int8. A row whose package or weights are absent is left out, and stderr says why. Word error rates follow Whisper's
English normalizer over the whole set; a forward pass of two responses side by side counts twice; CPU seconds are those
of the process, so that other work counts less. `--parts` adds CPU seconds a clip by part (encoder, draft, verifying,
left to right, denoising, casing), for batches of 1 and 8 and one and two threads. `taskset -c 0` pins to one core.

The four ablations of the paper (arXiv 2601.17902) are among the rows: exit alone is "no draft, no pruning" beside the
fixed steps; the prior is "draft" beside "no draft"; pruning is each of them beside its own without; the chat prompt has
no counterpart where the language model is Whisper's decoder, whose prompt is one start token.

Test recordings and Whisper's weights are made below `--data` by the recipe's scripts. LJ Speech and spoken digits are
in no package: `--public` names a folder with `lj/` and `fsdd.tar`. An absent set is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenthrift.backbones.whisper_decoder import WhisperDecoder, WhisperDecoderBackbone
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of, greedy
from tokenthrift.dllm_asr.config import DecodeConfig
from tokenthrift.dllm_asr.draft import length_guard
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.evaluation.wer import ErrorCount, character_errors, word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.recognizers.precision import with_precision
from tokenthrift.whisper import MAX_STATES, STATE_SAMPLES, states_of

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "dllm_asr"
SETS = ("asterisk", "lj", "librivox", "asterisk-short", "fsdd")
WHISPER = "Whisper tiny.en"
FASTER = {"faster-whisper tiny.en fp32": "float32", "faster-whisper tiny.en int8": "int8"}
FIXED = "diffusion from noise, 128 steps"
NOISE_SLOTS = 128
GATE = 1.12  # nats, chosen for the second weights on development recordings: `recipes/dllm_asr/decoding.py --gate`
INT8 = ("CTC draft alone, int8", "certified, int8", "left to right, int8")

# In no package: what `recordings.py` makes these of, below --public, and its option.
PUBLIC = {"lj": "lj", "fsdd": "fsdd.tar"}

Answer = tuple[str, int, int]  # text, denoising rounds, forward passes of the language model
System = Callable[[Tensor], Answer]


@dataclass(frozen=True)
class Result:
    """One system on one set."""

    system: str
    data: str
    words: ErrorCount
    characters: ErrorCount
    clips: int
    rounds: float
    forwards: float
    seconds: float
    work: float
    cpu: float = 0.0

    def row(self) -> dict[str, Any]:
        """Plain figures."""
        what = {"system": self.system, "set": self.data, "clips": self.clips}
        rates = {"wer": self.words.rate, "cer": self.characters.rate, "rounds": self.rounds, "forwards": self.forwards}
        cost = {"real_time_factor": self.work / self.seconds, "cpu_seconds_per_clip": self.cpu / self.clips}
        return {**what, **rates, **cost}


def diffusion(model: DllmAsr, settings: DecodeConfig, *, crop: bool = True) -> System:
    """The whole model under one setting of decoding; without `crop` the encoder reads 30 s, as Whisper's own does."""
    # Two responses side by side are two rows of every forward pass, and cost as much as two passes of one.
    responses = 2 if settings.draft == "both" else 1

    def transcribe(audio: Tensor) -> Answer:
        filled = audio if crop else F.pad(audio, (0, max(0, MAX_STATES * STATE_SAMPLES - len(audio))))
        states, lengths = model.encode([filled])
        lengths = lengths.clamp_max(states_of(len(audio)))
        (done,) = model.decode(states[:, : int(lengths)], lengths, settings=settings)
        return done.text, done.usage.rounds, responses * done.usage.rounds

    return transcribe


def ablations(model: DllmAsr) -> dict[str, System]:
    """The model by its own settings, and with one part or another left out.

    One response is read once, without `recheck`. A canvas of nothing but MASK cannot be filled in the few rounds that
    are enough for a draft: without one the paper's threshold stands, and no limit.
    """
    usual = replace(model.config.decode, certify=None)
    alone = replace(usual, draft="none", verify_committed=False, max_rounds=None, confidence_threshold=0.9)
    settings = {
        "diffusion, no draft": alone,
        "diffusion, no draft, no pruning": replace(alone, prune="never"),
        "diffusion, draft length": replace(usual, draft="length", verify_committed=False),
        "diffusion, draft's confident words": replace(usual, draft="confident", verify_committed=False),
        "diffusion, draft": usual,
        "diffusion, draft, no pruning": replace(usual, prune="never"),
        "diffusion, draft, gate": replace(usual, draft_entropy=GATE),
    }
    systems = {name: diffusion(model, way) for name, way in settings.items()}
    return {
        "certified": diffusion(model, certified_settings(model)),
        **systems,
        "diffusion, draft, 30 s encoder": diffusion(model, usual, crop=False),
    }


def certified_settings(model: DllmAsr) -> DecodeConfig:
    """The draft of the CTC head, certified."""
    return replace(model.config.decode, certify="ar", certify_draft="ctc", draft="confident")


def fixed_steps(model: DllmAsr, slots: int = NOISE_SLOTS) -> System:
    """The paper's naive baseline: so many slots of MASK, whatever the length, and one token a step."""
    alone = replace(model.config.decode, draft="none", verify_committed=False, verify_threshold=0.0, prune="never")
    alone = replace(alone, certify=None, max_rounds=slots, confidence_threshold=1.0, extra_slots_at_end=slots // 2)

    def transcribe(audio: Tensor) -> Answer:
        states, lengths = model.encode([audio])
        rate = (slots - slots // 2) / (int(lengths) / 50)
        settings = replace(alone, slots_per_second=min(50.0, max(0.1, rate)))
        (done,) = model.decode(states, lengths, settings=settings)
        return done.text, done.usage.rounds, done.usage.rounds

    return transcribe


def faster_whisper(folder: str, compute_type: str, threads: int) -> System:
    """Whisper through CTranslate2, greedy, without timestamps."""
    from faster_whisper import WhisperModel

    lm = WhisperModel(folder, device="cpu", compute_type=compute_type, cpu_threads=threads)

    def transcribe(audio: Tensor) -> Answer:
        segments, _ = lm.transcribe(audio.numpy(), language="en", beam_size=1, temperature=0.0, without_timestamps=True)
        found = list(segments)
        return " ".join(s.text.strip() for s in found), 0, sum(len(s.tokens) + 1 for s in found)

    return transcribe


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What it returns, and the CPU seconds that it took."""
    started = time.process_time()
    return work(*arguments), time.process_time() - started


def parts(model: DllmAsr, clips: list[tuple[Tensor, str]]) -> list[dict[str, Any]]:
    """CPU seconds a clip by part, for batches of 1 and 8 and one and two threads."""
    rows, denoise = [], replace(model.config.decode, certify=None)
    for threads, size in ((1, 1), (1, 8), (2, 1), (2, 8)):
        torch.set_num_threads(threads)
        spent: defaultdict[str, float] = defaultdict(float)
        for start in range(0, len(clips), size):
            encoded, encoding = timed(model.encode, [samples for samples, _ in clips[start : start + size]])
            words, drafting = timed(model.drafts, *encoded)
            done, verifying = timed(model.decode, *encoded, None, certified_settings(model))
            _, denoising = timed(model.decode, *encoded, None, denoise)
            _, casing = timed(model.as_read, done, *encoded)
            now = {"encoder": encoding, "draft": drafting, "casing": casing}
            now |= {"verifying": verifying - drafting, "denoising": denoising - drafting}  # both draft once more
            if isinstance(model.backbone, WhisperDecoderBackbone):
                limits = [length_guard(own, model.vocabulary) for own in words]
                memory = model.adapter(*encoded)
                _, now["left to right"] = timed(greedy, decoder_of(model), *memory, model.vocabulary, limits)
            for name, seconds in now.items():
                spent[name] += seconds / len(clips)
        own = {name: max(0.0, seconds) for name, seconds in spent.items()}
        rows.append({"threads": threads, "batch": size, "clips": len(clips), **own})
    return rows


def draft_alone(model: DllmAsr) -> System:
    """The CTC head without a language model."""

    @torch.inference_mode()
    def transcribe(audio: Tensor) -> Answer:
        (words,) = model.drafts(*model.encode([audio]))
        return " ".join(w.text for w in words), 0, 0

    return transcribe


def left_to_right(model: DllmAsr, decoder: WhisperDecoder) -> System:
    """A decoder over the model's encoder and adapter, greedy, with its cache, stopped at the length guard."""

    @torch.inference_mode()
    def transcribe(audio: Tensor) -> Answer:
        states, lengths = model.encode([audio])
        (words,) = model.drafts(states, lengths)
        limit = length_guard(words, model.vocabulary)
        memory, mask = model.adapter(states, lengths)
        (ids,) = greedy(decoder, memory, mask, model.vocabulary, [limit])
        return model.vocabulary.text(ids), 0, min(limit, len(ids) + 1)

    return transcribe


def whisper(folder: str) -> System:
    """Whisper through transformers, greedy, with its cache, on 30 s of padded audio."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

    lm = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    lm.generation_config.max_length = None  # max_new_tokens says it
    features = WhisperFeatureExtractor(feature_size=lm.config.num_mel_bins)
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    start = torch.tensor([[50_257, 50_362]])  # <|startoftranscript|> <|notimestamps|> of the English models
    end = lm.config.eos_token_id
    unused = dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"))
    greedily: dict[str, Any] = {"do_sample": False, "num_beams": 1, **unused}

    @torch.inference_mode()
    def transcribe(audio: Tensor) -> Answer:
        mel = features(audio.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        ids = lm.generate(mel, decoder_input_ids=start, max_new_tokens=200, eos_token_id=end, **greedily)[0]
        text = [int(i) for i in ids if i < end]
        return tokenizer.decode(text), 0, len(text) + 1

    return transcribe


def measure(name: str, system: System, data: str, clips: list[tuple[Tensor, str]]) -> Result:
    """Runs a system over a set, after one clip of warm-up."""
    system(clips[0][0])
    started, cpu = time.perf_counter(), time.process_time()
    answers = [system(audio) for audio, _ in clips]
    work, cpu = time.perf_counter() - started, time.process_time() - cpu
    truth, texts = [text for _, text in clips], [a[0] for a in answers]
    return Result(
        name,
        data,
        word_errors(truth, texts),
        character_errors(truth, texts),
        len(clips),
        sum(a[1] for a in answers) / len(clips),
        sum(a[2] for a in answers) / len(clips),
        sum(len(audio) for audio, _ in clips) / 16_000,
        work,
        cpu,
    )


def read_set(folder: Path, seconds: float = 30.0) -> list[tuple[Tensor, str]]:
    """Recordings and references of a manifest, those that are not longer."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    clips = [(read_audio(folder / row["audio_filepath"]), row["text"]) for row in rows]
    return [(audio, text) for audio, text in clips if len(audio) <= seconds * 16_000]


def prepare_sets(data: Path, public: Path, names: list[str]) -> list[str]:
    """Makes the test sets that are missing below `data`; those of `names` that are there then, the others are named."""
    sources = {name: public / file for name, file in PUBLIC.items() if (public / file).exists()}
    missing = [name for name in names if not (data / "test" / name).is_dir()]
    if any(name in sources or name in set(SETS) - set(PUBLIC) for name in missing):
        options = [part for name, path in sources.items() for part in (f"--{name}", str(path))]
        subprocess.run(
            [sys.executable, str(RECIPE / "recordings.py"), str(data), *options], check=True, stdout=sys.stderr
        )
    there = [name for name in names if (data / "test" / name).is_dir()]
    for name in names:
        if name not in there:
            hint = f"; --public FOLDER makes it of FOLDER/{PUBLIC[name]}" if name in PUBLIC else ""
            print(f"{name} is left out: there is no {data / 'test' / name}{hint}", file=sys.stderr)
    return there


def prepare_whisper(data: Path) -> str:
    """The Whisper checkpoint below `data`, made if it is missing."""
    made = data / "whisper-tiny.en"
    if not made.is_dir():
        script = str(RECIPE / "whisper_from_package.py")
        subprocess.run([sys.executable, script, str(made)], check=True, stdout=sys.stderr)
    return str(made)


def in_int8(model: DllmAsr) -> dict[str, System]:
    """The systems of `INT8`; the model is changed."""
    with_precision(model, model, "int8")
    draft, certified, text = INT8
    systems = {draft: draft_alone(model), certified: diffusion(model, certified_settings(model))}
    if isinstance(model.backbone, WhisperDecoderBackbone):
        systems[text] = left_to_right(model, decoder_of(model))
    return systems


def show(results: list[Result], sets: list[str]) -> None:
    """One table a set."""
    for name in sets:
        rows = [r for r in results if r.data == name]
        if not rows:
            continue
        table = Table(title=f"{name}: {rows[0].clips} recordings, {rows[0].seconds:.0f} s", title_justify="left")
        for column in ("system", "WER %", "CER %", "rounds", "LM forward passes", "real-time factor", "CPU s a clip"):
            table.add_column(column, justify="left" if column == "system" else "right")
        for r in rows:
            rates = [f"{100 * r.words.rate:.1f}", f"{100 * r.characters.rate:.1f}", f"{r.rounds:.2f}"]
            costs = [f"{r.forwards:.1f}", f"{r.work / r.seconds:.3f}", f"{r.cpu / r.clips:.3f}"]
            table.add_row(r.system, *rates, *costs)
        Console(width=110).print(table)


def pooled(results: list[Result], names: tuple[str, ...], title: str) -> list[Result]:
    """Several sets as one, for each system."""
    out = []
    for system in dict.fromkeys(r.system for r in results):
        rows = [r for r in results if r.system == system and r.data in names]
        if len(rows) == len(names):
            clips = sum(r.clips for r in rows)
            rounds, forwards = (sum(getattr(r, k) * r.clips for r in rows) / clips for k in ("rounds", "forwards"))
            words, letters = (sum((getattr(r, k) for r in rows), ErrorCount()) for k in ("words", "characters"))
            seconds, work, cpu = (sum(getattr(r, k) for r in rows) for k in ("seconds", "work", "cpu"))
            out.append(Result(system, title, words, letters, clips, rounds, forwards, seconds, work, cpu))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "model_cards" / "dllm-asr-tiny-en"), help="folder or Hub id")
    parser.add_argument("--baseline", type=Path, help="folder of a decoder trained on the states of the same encoder")
    parser.add_argument("--whisper", help="transformers checkpoint; by default the one of a package, made below --data")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "dllm_asr", help="where test recordings are or go")
    parser.add_argument("--public", type=Path, default=ROOT / "data" / "public", help="holds lj/ and fsdd.tar")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="test sets (default: all)")
    parser.add_argument("--systems", nargs="+", help="measure only these, by the names in the table (default: all)")
    parser.add_argument("--limit", type=int, help="use only the first so many recordings of each set")
    parser.add_argument("--shorter-than", type=float, default=30.0, help="seconds of the longest recording to use")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctranslate2", help="Whisper tiny.en for faster-whisper: a folder, or its name on the Hub")
    parser.add_argument("--parts", action="store_true", help="CPU seconds by part too")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sets = prepare_sets(arguments.data, arguments.public, arguments.sets)
    model = DllmAsr.from_pretrained(arguments.model)
    systems: dict[str, System] = {"CTC draft alone": draft_alone(model), **ablations(model)}
    if isinstance(model.backbone, WhisperDecoderBackbone):
        systems["left to right, same weights"] = left_to_right(model, decoder_of(model))
    if arguments.baseline is not None:
        baseline = AutoregressiveDecoder.from_pretrained(arguments.baseline)
        systems["autoregressive, same size"] = left_to_right(model, baseline.decoder)
    systems[FIXED] = fixed_steps(model)
    known = [*systems, *INT8, WHISPER, *FASTER]
    chosen = arguments.systems or known
    if unknown := set(chosen) - set(known):
        parser.error(f"no such system: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if set(INT8) & set(chosen):
        systems |= in_int8(DllmAsr.from_pretrained(arguments.model))
    if WHISPER in chosen:
        systems[WHISPER] = whisper(arguments.whisper or prepare_whisper(arguments.data))
    for name, kind in FASTER.items():
        if name in chosen:
            try:
                systems[name] = faster_whisper(arguments.ctranslate2 or "tiny.en", kind, arguments.threads)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
    systems = {name: system for name, system in systems.items() if name in chosen}
    results, split = [], []
    read = {name: read_set(arguments.data / "test" / name, arguments.shorter_than)[: arguments.limit] for name in sets}
    for name, clips in read.items():
        for label, system in systems.items():
            results.append(measure(label, system, name, clips))
            print(f"{name}: {label} done in {results[-1].work:.0f} s", file=sys.stderr)
    results += pooled(results, ("lj", "librivox"), "lj + librivox")
    show(results, [*sets, "lj + librivox"])
    if arguments.parts:
        split = [{"set": name, **row} for name in sets for row in parts(model, read[name])]
        for row in split:
            print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        figures: Any = [r.row() for r in results]
        figures = {"systems": figures, "parts": split} if split else figures
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
