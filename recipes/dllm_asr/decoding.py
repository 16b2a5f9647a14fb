"""Decoding settings by development data: `python decoding.py MODEL [--write]`.

Word error rate and rounds of every combination of what is made of the draft, the commit threshold, the most rounds, the
posterior from which a word of the draft is kept, the probability below which the language model opens it again, and
whether it does so with its own words too; over the real development prompts of three words or more, over some synthetic
development utterances, and over the shorter real prompts, never mixed. The best is the lowest mean of the first two
error rates whose mean rounds stay within `--rounds` on both; `--write` stores it in the model's config.json, with the
`--trailing-silence` that was given. Synthetic utterances are cached states, which never have one.

`--gate` then finds the highest entropy of a frame up to which recordings may keep their draft: those below it have no
more errors in their drafts than in their transcripts. It also says how far the confidences of draft words are from how
often they are right (expected calibration error, Guo et al., 2017).
"""

from __future__ import annotations

import argparse
import itertools
import random
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.config import DecodeConfig
from tokenthrift.dllm_asr.draft import draft_entropy
from tokenthrift.dllm_asr.training.data import CachedStates
from tokenthrift.evaluation.wer import word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.transcription.references import read_references

Item = tuple[Tensor, str]


def real_items(model: DllmAsr, folders: list[Path], *, short: bool = False, every: int = 1) -> list[Item]:
    """Encoder states and text of the development recordings of three words or more, or of fewer, beeps left out."""
    said = [row for folder in folders for row in read_references(folder / "manifest.jsonl").texts.items()]
    chosen = [(path, text) for path, text in said if (len(text.split()) < 3) == short and "<" not in text]
    return [(model.encode([read_audio(path)])[0][0], text) for path, text in chosen[::every]]


def synthetic_items(features: Path, count: int) -> list[Item]:
    """Cached states and text of some synthetic development utterances, the same for every model."""
    cached = CachedStates(sorted(features.glob("dev-*.safetensors")))
    chosen = random.Random(1).sample(range(len(cached)), min(count, len(cached)))
    return [(cached[0, i].states.float(), cached[0, i].text) for i in chosen]


def measure(model: DllmAsr, items: list[Item], settings: DecodeConfig, batch: int = 12) -> tuple[float, float, float]:
    """Word error rate of the drafts and of the transcripts, and mean rounds."""
    items = sorted(items, key=lambda item: len(item[0]))
    truth, drafts, texts, rounds = [], [], [], []
    for start in range(0, len(items), batch):
        states = [item[0] for item in items[start : start + batch]]
        padded, lengths = pad_sequence(states, batch_first=True), torch.tensor([len(s) for s in states])
        done = model.decode(padded, lengths, settings=settings)
        truth += [text for _, text in items[start : start + batch]]
        drafts += [" ".join(word.text for word in words) for words in model.drafts(padded, lengths)]
        texts += [transcript.text for transcript in done]
        rounds += [transcript.usage.rounds for transcript in done]
    return word_errors(truth, drafts).rate, word_errors(truth, texts).rate, sum(rounds) / len(rounds)


@torch.inference_mode()
def find_gate(model: DllmAsr, items: list[Item], settings: DecodeConfig) -> tuple[float, float, float]:
    """The entropy up to which drafts may stay, the share of recordings below it, and the calibration error of words."""
    rows: list[tuple[float, int, int]] = []
    words: list[tuple[float, bool]] = []
    for states, text in items:
        lengths = torch.tensor([len(states)])
        (draft,) = model.drafts(states[None], lengths)
        (done,) = model.decode(states[None], lengths, settings=replace(settings, draft_entropy=0.0))
        entropy = draft_entropy(model.draft(states[None], lengths)[0])
        drafted = [word.text for word in draft]
        own, decoded = (word_errors([text], [written]).errors for written in (" ".join(drafted), done.text))
        rows.append((entropy, own, decoded))
        right = {
            position
            for block in SequenceMatcher(None, drafted, text.split(), autojunk=False).get_matching_blocks()
            for position in range(block.a, block.a + block.size)
        }
        words += [(word.confidence, position in right) for position, word in enumerate(draft)]
    best, drafted_errors, transcript_errors = (0.0, 0.0), 0, 0
    for count, (entropy, own, decoded) in enumerate(sorted(rows), 1):
        drafted_errors, transcript_errors = drafted_errors + own, transcript_errors + decoded
        if drafted_errors <= transcript_errors:
            best = entropy, count / len(rows)
    return *best, calibration_error(words)


def calibration_error(words: list[tuple[float, bool]], bins: int = 10) -> float:
    """Mean distance between the confidence of words and how many of them are right, over bins of confidence."""
    total = 0.0
    for index in range(bins):
        own = [(p, right) for p, right in words if min(int(p * bins), bins - 1) == index]
        total += abs(sum(p - right for p, right in own))
    return total / max(1, len(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--dev", type=Path, nargs="+", default=[Path("data/dllm_asr/dev/asterisk")])
    parser.add_argument("--every", type=int, default=1, help="use only every n-th real recording")
    parser.add_argument("--features", type=Path, default=Path("data/dllm_asr/features"))
    parser.add_argument("--utterances", type=int, default=60, help="synthetic ones, or 0 (default: %(default)s)")
    parser.add_argument("--rounds", type=float, default=4.0, help="most mean rounds (default: %(default)s)")
    parser.add_argument("--draft", nargs="+", default=["confident", "both"])
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--max-rounds", type=int, nargs="+", default=[4])
    parser.add_argument("--draft-threshold", type=float, nargs="+", default=[0.95])
    parser.add_argument("--verify-threshold", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--verify-committed", type=int, choices=[0, 1], nargs="+", default=[0, 1])
    parser.add_argument(
        "--trailing-silence", type=float, help="seconds of silence after real recordings (default: the model's)"
    )
    parser.add_argument("--gate", action="store_true", help="find the entropy up to which drafts may stay")
    parser.add_argument("--write", action="store_true", help="store the best in the model's config.json")
    arguments = parser.parse_args()
    model = DllmAsr.from_pretrained(arguments.model)
    if arguments.trailing_silence is not None:
        model.config = replace(
            model.config, encoder=replace(model.config.encoder, trailing_silence=arguments.trailing_silence)
        )
    sets = [real_items(model, arguments.dev, every=arguments.every)]
    if arguments.utterances:
        sets.append(synthetic_items(arguments.features, arguments.utterances))
    shorter = real_items(model, arguments.dev, short=True, every=arguments.every)
    denoising = replace(model.config.decode, certify=None)  # it is the denoiser whose settings are chosen
    best: tuple[float, dict[str, Any]] | None = None
    synthetic = sum(map(len, sets[1:]))
    print(f"{len(sets[0])} real recordings, {synthetic} synthetic utterances, {len(shorter)} shorter recordings")
    names = ("draft", "confidence_threshold", "max_rounds", "draft_threshold", "verify_threshold", "verify_committed")
    print(*names, "| real: WER draft rounds | synthetic | shorter")
    grid = (
        arguments.draft,
        arguments.threshold,
        arguments.max_rounds,
        arguments.draft_threshold,
        arguments.verify_threshold,
        map(bool, arguments.verify_committed),
    )
    for values in itertools.product(*grid):
        chosen = dict(zip(names, values, strict=True))
        settings = replace(denoising, **chosen)
        rows = [measure(model, items, settings) for items in sets]
        shown = [*rows, measure(model, shorter, settings)] if shorter else rows
        figures = " | ".join(f"{wer:.3f} {draft_wer:.3f} {rounds:.2f}" for draft_wer, wer, rounds in shown)
        print(" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values), "|", figures, flush=True)
        mean = sum(wer for _, wer, _ in rows) / len(rows)
        if all(rounds <= arguments.rounds for _, _, rounds in rows) and (best is None or mean < best[0]):
            best = mean, chosen
    if best is None:
        raise SystemExit(f"nothing stays within {arguments.rounds:g} rounds")
    print("best:", best[1])
    if arguments.gate:
        items = [item for part in (*sets, shorter) for item in part]
        entropy, share, error = find_gate(model, items, replace(denoising, **best[1]))
        best[1]["draft_entropy"] = entropy
        print(
            f"gate: {entropy:.4f} nats keep {100 * share:.1f} % of the drafts; calibration error of words {error:.3f}"
        )
    if arguments.write:
        model.config = replace(model.config, decode=replace(model.config.decode, **best[1]))
        model.save_pretrained(arguments.model, dtype=torch.float16)


if __name__ == "__main__":
    main()
