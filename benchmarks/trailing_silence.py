"""How much silence Whisper's encoder needs after a recording: error rates and CPU seconds.

    taskset -c 0 python benchmarks/trailing_silence.py MANIFEST FOLDER [--every 3] [--seconds 30 20 15 10]

MANIFEST is JSON lines with `audio_filepath` and `text`, for development, FOLDER a Whisper of CTranslate2. Recordings of
at most 30 s go to the recognizer one by one, without the windows of the batch job. Error rates follow Whisper's
normalizer over all recordings; CPU seconds are those of the process, loading left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tokenthrift.evaluation.wer import word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.recognizers.whisper_ctranslate2 import load_ctranslate2


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--every", type=int, default=3, help="only every n-th recording (default: %(default)s)")
    parser.add_argument("--seconds", nargs="+", type=float, default=[30.0, 20.0, 15.0, 10.0], help="of silence")
    parser.add_argument("--precision", default="int8", help="int8 or float32 (default: %(default)s)")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines()]
    clips = [
        (read_audio(arguments.manifest.parent / r["audio_filepath"]), r["text"]) for r in lines[:: arguments.every]
    ]
    clips = [(audio, text) for audio, text in clips if len(audio) <= 30 * 16_000]
    print(f"{len(clips)} recordings, {sum(len(audio) for audio, _ in clips) / 16_000:.0f} s")
    print("| silence s | WER | without insertions | CPU s a recording |\n| --- | --- | --- | --- |")
    for silence in arguments.seconds:
        model = load_ctranslate2(arguments.model, precision=arguments.precision, threads=1, trailing_silence=silence)
        started = time.process_time()
        texts = [model.transcribe([audio])[0].text for audio, _ in clips]
        seconds = (time.process_time() - started) / len(clips)
        errors = word_errors([text for _, text in clips], texts)
        lost = (errors.substitutions + errors.deletions) / (errors.hits + errors.substitutions + errors.deletions)
        print(f"| {silence:g} | {100 * errors.rate:.1f} % | {100 * lost:.1f} % | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
