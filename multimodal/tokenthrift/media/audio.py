"""Audio files to float samples, in a stream: memory does not grow with the length of a recording.

What is promised of every file that is read:

- A time is in seconds from the start of the presentation of the whole file (`container`), the same instant for
  `read_audio`, `read_frames` and lips: sample k is heard at k / sample_rate. The timestamps of the file are the truth:
  where sound starts late or pauses there is silence, and what overlaps is trimmed.
- Of several tracks the default one is read unless another is named (`tracks`). Its channels are averaged, and where
  that would cancel them the louder one is taken instead (`mixing`).

libsndfile reads what it knows (WAV, FLAC, Ogg, AIFF, CAF, AU), FFmpeg through PyAV everything else (MP3, M4A, MP4,
WebM, AMR, G.722, the sound of video files, Ogg of several streams). The decoder is chosen by the first bytes and not
by the suffix; only raw telephone formats, which have no header, are known by suffix. The rate is changed by FFmpeg's
resampler, whose result does not depend on how the stream was cut.

What a recording that is not whole gives (torchaudio, librosa and Whisper's ffmpeg pipe return whatever could be
decoded, without a word): a file that ends before the end its header states, that has lost more than half a second to
damage, that holds NaN, or no sample at all raises :class:`AudioError`. A header without a length is no error (a
recorder that lost power, a pipe). Ogg, ADTS, AMR and raw files, and MP3 files without an Info frame, state no length:
cut short, they are what they are.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import soundfile

from tokenthrift import extras
from tokenthrift.media.audio_track import (
    MAX_CHANNELS,
    AudioError,
    Block,
    Samples,
    check_length,
    decode_track,
    reads_by_libsndfile,
)
from tokenthrift.media.mixing import Channels, Mixer

if TYPE_CHECKING:  # Recognizers that do without PyTorch read `stream_samples` and do not wait for its import.
    from torch import Tensor

__all__ = ["RATES", "AudioError", "Channels", "Samples", "read_audio", "resample", "stream_audio", "stream_samples"]

# A length that a writer puts in the header of a stream whose length it does not know.
_UNKNOWN_LENGTH: Final = 0x7FFF0000
_BLOCK_SECONDS: Final = 4
_BLOCK_VALUES: Final = 4_000_000
RATES: Final = (1_000, 1_000_000)
"""Least and most samples per second of a recording."""
# A float file may exceed 1; beyond 16-bit integers stored as floats there is no sound, only a broken file.
_LARGEST: Final = 65536.0


def read_audio(
    path: str | Path, sample_rate: int = 16_000, *, track: int | str | None = None, channels: Channels = "mix"
) -> Tensor:
    """Reads a whole recording.

    Args:
        path: A sound or video file of any common format.
        sample_rate: Samples per second wanted.
        track: As in `stream_audio`.
        channels: As in `stream_audio`.

    Returns:
        (samples,) float32, mono; full scale is 1, sample 0 is at second 0 of the file.

    Raises:
        AudioError: The file cannot be read, is damaged, cut short or empty, or has no such track or channel.
        MissingExtraError: The file needs PyAV, which does not load.
    """
    import torch

    return torch.cat(list(stream_audio(path, sample_rate, track=track, channels=channels)))


def stream_audio(
    path: str | Path,
    sample_rate: int = 16_000,
    *,
    track: int | str | None = None,
    channels: Channels = "mix",
    notes: list[str] | None = None,
) -> Iterator[Tensor]:
    """Reads a recording piece by piece; joined, the pieces equal `read_audio`.

    Damage is found when it is reached: a consumer that must not act on half a recording reads to the end first.

    Args:
        path: As in `stream_samples`, with all that follows.
        sample_rate: Samples per second wanted.
        track: The number of a track, its language, or None.
        channels: What is read of it.
        notes: Receives what had to be chosen.

    Yields:
        (samples,) float32, mono, never empty, a few seconds each.

    Raises:
        AudioError: The file cannot be read, is damaged, cut short or empty, or has no such track or channel.
        MissingExtraError: The file, or a change of its rate, needs PyAV, which does not load.
    """
    import torch

    for samples in stream_samples(path, sample_rate, track=track, channels=channels, notes=notes):
        yield torch.from_numpy(samples)


def stream_samples(
    path: str | Path,
    sample_rate: int = 16_000,
    *,
    track: int | str | None = None,
    channels: Channels = "mix",
    notes: list[str] | None = None,
) -> Iterator[Samples]:
    """The same as `stream_audio` in arrays, without PyTorch.

    Args:
        path: A sound or video file of any common format.
        sample_rate: Samples per second wanted.
        track: The number of an audio track, from 1, or its language ("eng"); None for the default one.
        channels: "mix" averages them, and takes the louder where they cancel each other; "left", "right" or a number
            from 1 takes one.
        notes: Receives a sentence where "mix" had to choose; without it that goes to the log.

    Yields:
        (samples,) float32, mono, never empty, a few seconds each.

    Raises:
        AudioError: The file cannot be read, is damaged, cut short or empty, or has no such track or channel.
        MissingExtraError: The file, or a change of its rate, needs PyAV, which does not load.
    """
    path = Path(path)
    mixer, empty = Mixer(path, channels), True
    for samples in _resample(_decode(path, track, mixer), sample_rate):
        if len(samples):
            empty = False
            yield np.ascontiguousarray(samples)
    if empty:
        raise AudioError(path, "empty: no audio samples")
    if mixer.chosen and notes is not None:
        notes.append(mixer.remark)
    elif mixer.chosen:
        logging.getLogger("tokenthrift.media").warning("%s: %s", path, mixer.remark)


def resample(samples: Samples, rate: int, sample_rate: int) -> Samples:
    """Samples in memory at another rate, by the same resampler as files.

    Args:
        samples: (samples,) float32, mono.
        rate: Samples per second of them.
        sample_rate: Samples per second wanted.

    Raises:
        MissingExtraError: PyAV does not load.
    """
    return samples if rate == sample_rate else np.concatenate([*_convert([samples], rate, sample_rate)])


def _decode(path: Path, track: int | str | None, mixer: Mixer) -> Iterator[tuple[int, Samples]]:
    """Sample rate and mono samples as stored, checked."""
    seconds = 0.0
    sndfile = _decode_sndfile(path) if reads_by_libsndfile(path) and track in (None, 1) else iter(())
    for source in (sndfile, decode_track(path, track)):
        for (rate, _), blocks in groupby(source, key=lambda block: (block[0], block[1].shape[1])):
            if not RATES[0] <= rate <= RATES[1]:
                raise AudioError(path, f"corrupt: a sample rate of {rate} Hz")
            for samples in mixer.mix(rate, (_checked(path, samples, seconds) for _, samples in blocks)):
                seconds += len(samples) / rate
                yield rate, samples
        # A WAV file whose writer died states a length of 0, which libsndfile believes and FFmpeg does not.
        if seconds:
            return


def _checked(path: Path, samples: Samples, seconds: float) -> Samples:
    # False for NaN as well, which is why it is not written the other way round.
    if not np.all(np.abs(samples) <= _LARGEST):
        raise AudioError(path, f"corrupt: NaN, infinite or huge samples after {seconds:.1f} s")
    return samples


def _decode_sndfile(path: Path) -> Iterator[Block]:
    # A descriptor, because by name soundfile takes everything called *.raw for headerless.
    with path.open("rb") as handle:
        try:
            file = soundfile.SoundFile(handle.fileno(), closefd=False)
        except soundfile.LibsndfileError:
            return
        with file:
            rate, read = file.samplerate, 0
            if not RATES[0] <= rate <= RATES[1]:
                raise AudioError(path, f"corrupt: a sample rate of {rate} Hz")
            if file.channels > MAX_CHANNELS:
                raise AudioError(path, f"corrupt: {file.channels} channels; at most {MAX_CHANNELS} are read")
            size = min(_BLOCK_SECONDS * rate, _BLOCK_VALUES // file.channels)
            _check_riff_length(path, file)
            while True:
                try:
                    block = file.read(size, dtype="float32", always_2d=True)
                except soundfile.LibsndfileError as error:
                    # Blocks are long, so where in the next one is not known.
                    where = f" after the first {read / rate:.1f} s" if read else ""
                    raise AudioError(path, f"corrupt or cut short{where}: {error}") from error
                if not len(block):
                    break
                read += len(block)
                yield rate, block
            check_length(path, stated=file.frames / rate, decoded=read / rate)


def _check_riff_length(path: Path, file: Any) -> None:
    """libsndfile shortens a cut WAV or AIFF file to what is there and tells so only in its log."""
    for stated, found in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info):
        if int(found) < int(stated) < _UNKNOWN_LENGTH and file.frames:
            share = int(stated) / max(int(found), 1)
            seconds = file.frames / file.samplerate
            check_length(path, stated=seconds * share, decoded=seconds)


def _resample(blocks: Iterator[tuple[int, Samples]], sample_rate: int) -> Iterator[Samples]:
    """Brings every stretch of one rate to `sample_rate`; a file may change its rate on the way."""
    for rate, stretch in groupby(blocks, key=lambda block: block[0]):
        samples = (samples for _, samples in stretch)
        yield from samples if rate == sample_rate else _convert(samples, rate, sample_rate)


def _convert(blocks: Iterable[Samples], rate: int, sample_rate: int) -> Iterator[Samples]:
    av = extras.require("av")
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    taken = given = 0

    def resample(samples: Samples) -> Iterator[Samples]:
        # FFmpeg refuses frames of very many samples; a second is enough for speed.
        for start in range(0, len(samples), rate):
            part = np.ascontiguousarray(samples[None, start : start + rate])
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="mono")
            frame.sample_rate = rate
            for out in resampler.resample(frame):
                yield out.to_ndarray()[0]

    for block in blocks:
        taken += len(block)
        for out in resample(block):
            given += len(out)
            yield out
    # The filter holds back its last samples, and all of a very short stretch, until zeros push them out.
    tail = np.concatenate([*resample(np.zeros(math.ceil(rate / 10), dtype=np.float32))])
    wanted = max(round(taken * sample_rate / rate), min(taken, 1))
    yield tail[: max(0, wanted - given)]
