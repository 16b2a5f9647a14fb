"""The options of `tokenthrift transcribe`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tokenthrift.commands.arguments import add_any_suffix, add_engine, add_model_option, count, number
from tokenthrift.transcription.writers import WRITERS

__all__ = ["MANIFEST", "make_parser"]

MANIFEST = "manifest.jsonl"

_DESCRIPTION = """\
Writes down what is said in recordings: files, whole folders or quoted patterns,
of any common sound or video format and any length. Silence gives empty text.

With --out-dir every recording gets its files there, in the folders it came from;
with --format alone they go beside the recordings. A recording that was done with
the same model and options is skipped, so a job that was killed goes on where it
was; --overwrite does all again. Without both, or with --references, the
transcripts are printed as a table."""

_EPILOG = """\
examples:
  tokenthrift transcribe talk.mp3 --model model_cards/dllm-asr-tiny-en
  tokenthrift transcribe calls/ --model owner/name --out-dir out --format txt srt
  tokenthrift transcribe 'calls/**/*.wav' --model owner/name --out-dir out
  tokenthrift transcribe calls.jsonl --model openai/whisper-tiny.en --out-dir out
  find . -name '*.ogg' | tokenthrift transcribe - --model owner/name --format srt

exit status:
  0    every recording was transcribed or skipped
  1    some could not be read, transcribed or written and are named on stderr;
       the others were
  2    wrong usage: an unknown option, a path that leads to nothing, a model that
       cannot be used
  130  interrupted by Ctrl-C or SIGTERM; what was written until then is complete"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tokenthrift transcribe`."""
    parser = argparse.ArgumentParser(
        prog="tokenthrift transcribe",
        usage="%(prog)s INPUT... --model MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a recording, a folder, or a pattern in quotes")
    add_model_option(parser)
    add_any_suffix(parser)
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="where the files go; made if it does not exist")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=[*WRITERS, "jsonl"],
        metavar="FORMAT",
        help="any of txt json srt vtt tsv karaoke (WebVTT with the time of every word), and jsonl, one file for all "
        "(default: txt)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="skip what is done (the default)")
    again.add_argument("--overwrite", action="store_true", help="do all again, and replace files of others")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the tokens and seconds of every file, and transcribe nothing"
    )
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first recording that fails")
    parser.add_argument(
        "--flag-below", type=number(0, 1), metavar="P", help="name recordings whose mean confidence is lower"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write a page to look at: sound, words, confidences, errors"
    )
    parser.add_argument(
        "--manifest-root",
        type=Path,
        metavar="DIR",
        help="where all that an input manifest names must lie (default: the folder of the manifest)",
    )
    parser.add_argument(
        "--references",
        nargs="?",
        const="",
        metavar="FILE",
        help='score against what was said, lines of {"audio_filepath": "a.wav", "text": "..."} with paths relative '
        f"to FILE (without FILE: {MANIFEST} beside the recordings)",
    )
    speech = parser.add_argument_group("speech, for models that take these")
    speech.add_argument("--language", metavar="LANG", help="the language spoken: en, de ... (default: found)")
    speech.add_argument(
        "--task", choices=["transcribe", "translate"], default="transcribe", help="translate writes English"
    )
    speech.add_argument("--align", metavar="MODEL", help="a CTC model that times words where the model gives no times")
    sound = parser.add_argument_group("sound")
    sound.add_argument(
        "--track",
        type=_track,
        metavar="N|LANG|all",
        help="of files with several sound tracks: a number from 1, a language such as eng, or all, each by itself "
        "(default: the one that a player takes)",
    )
    sound.add_argument(
        "--channels",
        choices=["mix", "left", "right", "each"],
        default="mix",
        help="mix them, take one, or transcribe each by itself, as for calls (default: %(default)s)",
    )
    speech.add_argument(
        "--drop-below",
        type=number(0, 1, or_equal=True),
        default=0.0,
        metavar="P",
        help="leave out words of less confidence (default: %(default)s, none)",
    )
    decoding = parser.add_argument_group("decoding, for each window of at most 30 s")
    decoding.add_argument(
        "--max-rounds", type=count, metavar="N", help="most denoising rounds (default: the model's own)"
    )
    decoding.add_argument(
        "--max-new-tokens", type=count, metavar="N", help="most tokens to write (default: the model's own)"
    )
    decoding.add_argument(
        "--confidence-threshold",
        type=number(0, 1),
        metavar="P",
        help="probability from which a token is kept; lower is faster and less exact (default: the model's own)",
    )
    decoding.add_argument(
        "--plain", action="store_true", help="lower-case words, also by a model that writes casing and punctuation"
    )
    decoding.add_argument(
        "--certify",
        choices=["ar"],
        help="write exactly the greedy left-to-right text of the model, sooner: it verifies drafts",
    )
    decoding.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a CTC model whose words dLLM-ASR corrects instead of its own draft",
    )
    decoding.add_argument(
        "--hotwords", nargs="+", default=[], metavar="WORD", help="words that are likely; they gain where it is unsure"
    )
    tokens = parser.add_argument_group("tokens, for models with several rates, each window of at most 30 s")
    tokens.add_argument("--budget", metavar="B", help="most tokens: 64, 25%%, 12.5/s (default: the model's own rates)")
    tokens.add_argument(
        "--coarse-to-fine", action="store_true", help="use finer rates only where the text has a low confidence"
    )
    tokens.add_argument("--noise-aware", action="store_true", help="choose audio and video rates by the noise")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-seconds",
        type=number(0),
        default=120.0,
        metavar="S",
        help="seconds of audio the model sees at once; less needs less memory (default: %(default)g)",
    )
    machine.add_argument(
        "--precision",
        choices=["float32", "int8"],
        help="of the model; int8 is faster on a processor, and its text may differ (default: the model's own)",
    )
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add_engine(machine)
    return parser


def _track(text: str) -> int | str:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    if not text.replace("-", "").isalpha():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1, a language such as eng, or all")
    return text.lower()
