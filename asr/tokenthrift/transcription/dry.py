"""`--dry-run`: the seconds and tokens of every recording from its header, before anything is transcribed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokenthrift.transcription.engine import JobSpec
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.writers import one_line

__all__ = ["dry_run"]


def dry_run(spec: JobSpec, recordings: Sequence[Recording], skipped: int) -> int:
    """Prints a line for each recording and the sums; the exit status.

    Tokens are those of windows of the greatest length; the job leaves silence out, so that they are a bound.
    """
    from tokenthrift.budget import ItemSize
    from tokenthrift.media.errors import MediaError
    from tokenthrift.media.probe import probe
    from tokenthrift.transcription.files import windows_of
    from tokenthrift.transcription.sound import missing_sound

    model = spec.transcriber().model
    total_seconds, total_tokens, failed = 0.0, 0, 0
    print(f"{'seconds':>10}  {'tokens':>8}  file")
    for recording in recordings:
        try:
            if recording.error is not None:
                raise ValueError(recording.error)
            seconds = max(0.0, (probe(recording.path).size.seconds or 0.0) - recording.offset)
            missing_sound(recording, seconds)
            seconds = min(seconds, recording.duration or seconds)
            windows = windows_of(ItemSize(seconds=seconds or None), min(30.0, model.max_seconds)) if seconds else []
            tokens = sum(usage.used for usage in model.plan(windows, spec.budget)) if windows else 0
        except (MediaError, ValueError) as error:
            failed += 1
            print(f"{'-':>10}  {'-':>8}  {one_line(recording.path)}")
            reason = str(getattr(error, "reason", None) or error)
            print(f"failed: {one_line(recording.path)}: {one_line(reason)}", file=sys.stderr)
            continue
        total_seconds, total_tokens = total_seconds + seconds, total_tokens + tokens
        print(f"{seconds:10.1f}  {tokens:8d}  {one_line(recording.path)}")
    done = f", {skipped} done already" if skipped else ""
    print(f"{total_seconds:10.1f}  {total_tokens:8d}  {len(recordings)} files to do{done}")
    return 1 if failed else 0
