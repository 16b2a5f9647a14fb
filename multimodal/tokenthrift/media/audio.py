"""Audio files to mono float samples, in a stream: memory does not grow with the length of a recording.

libsndfile reads what it knows (WAV, FLAC, Ogg, AIFF, CAF, AU), FFmpeg through PyAV everything else (MP3, M4A, MP4,
WebM, AMR, G.722, the sound of video files). The decoder is chosen by the first bytes and not by the suffix, so a file
with the wrong name is still read; only raw telephone formats, which have no header, are known by suffix. Channels are
averaged and the rate is changed by FFmpeg's resampler, whose result does not depend on how the stream was cut.

What a recording that is not whole gives (torchaudio, librosa and Whisper's ffmpeg pipe return whatever could be
decoded, without a word): a file that ends before the length its header states, that has lost more than half a second to
damage, that holds NaN, or no sample at all raises :class:`AudioError`. A header without a length is no error (a
recorder that lost power, a pipe). Ogg, ADTS, AMR and raw files, and MP3 files without an Info frame, state no length:
cut short, they are what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenthrift import extras
from tokenthrift.media.suffixes import RAW_FORMATS

__all__ = ["AudioError", "read_audio", "stream_audio"]

Samples: TypeAlias = NDArray[np.float32]

_SNDFILE_MAGIC: Final = (b"RIFF", b"RF64", b"RIFX", b"riff", b"fLaC", b"OggS", b"FORM", b"caff", b".snd")
# A length that a writer puts in the header of a stream whose length it does not know.
_UNKNOWN_LENGTH: Final = 0x7FFF0000
_LOST_SECONDS: Final = 0.5
_BLOCK_SECONDS: Final = 4
_RATES: Final = (1_000, 1_000_000)
# A float file may exceed 1; beyond 16-bit integers stored as floats there is no sound, only a broken file.
_LARGEST: Final = 65536.0


class AudioError(ValueError):
    """A file that gives no whole recording; `path` is the file and `reason` says why, fit for a report."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_audio(path: str | Path, sample_rate: int = 16_000) -> Tensor:
    """Reads a whole recording.

    Args:
        path: A sound or video file of any common format.
        sample_rate: Samples per second wanted.

    Returns:
        (samples,) float32, mono; full scale is 1.

    Raises:
        AudioError: The file cannot be read, is damaged, cut short or empty.
        MissingExtraError: The file needs PyAV, which is not installed.
    """
    return torch.cat(list(stream_audio(path, sample_rate)))


def stream_audio(path: str | Path, sample_rate: int = 16_000) -> Iterator[Tensor]:
    """Reads a recording piece by piece; joined, the pieces equal `read_audio`.

    Damage is found when it is reached: a consumer that must not act on half a recording reads to the end first.

    Args:
        path: A sound or video file of any common format.
        sample_rate: Samples per second wanted.

    Yields:
        (samples,) float32, mono, never empty, a few seconds each.

    Raises:
        AudioError: The file cannot be read, is damaged, cut short or empty.
        MissingExtraError: The file, or a change of its rate, needs PyAV, which is not installed.
    """
    path = Path(path)
    empty = True
    for samples in _resample(_decode(path), sample_rate):
        if len(samples):
            empty = False
            yield torch.from_numpy(np.ascontiguousarray(samples))
    if empty:
        raise AudioError(path, "empty: no audio samples")


def _decode(path: Path) -> Iterator[tuple[int, Samples]]:
    """Sample rate and mono samples as stored, checked."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise AudioError(path, f"cannot be read: {error.strerror}") from error
    if not magic:
        raise AudioError(path, "empty: a file of 0 bytes")
    seconds = 0.0
    sndfile = _decode_sndfile(path) if magic in _SNDFILE_MAGIC else iter(())
    for source in (sndfile, _decode_av(path)):
        for rate, samples in source:
            if not _RATES[0] <= rate <= _RATES[1]:
                raise AudioError(path, f"corrupt: a sample rate of {rate} Hz")
            # False for NaN as well, which is why it is not written the other way round.
            if not np.all(np.abs(samples) <= _LARGEST):
                raise AudioError(path, f"corrupt: NaN, infinite or huge samples after {seconds:.1f} s")
            seconds += len(samples) / rate
            yield rate, samples
        # A WAV file whose writer died states a length of 0, which libsndfile believes and FFmpeg does not.
        if seconds:
            return


def _decode_sndfile(path: Path) -> Iterator[tuple[int, Samples]]:
    # A descriptor, because by name soundfile takes everything called *.raw for headerless.
    with path.open("rb") as handle:
        try:
            file = soundfile.SoundFile(handle.fileno(), closefd=False)
        except soundfile.LibsndfileError:
            return
        with file:
            rate, read = file.samplerate, 0
            _check_riff_length(path, file)
            while True:
                try:
                    block = file.read(_BLOCK_SECONDS * rate, dtype="float32", always_2d=True)
                except soundfile.LibsndfileError as error:
                    raise AudioError(path, f"corrupt or cut short after {read / rate:.1f} s: {error}") from error
                if not len(block):
                    break
                read += len(block)
                yield rate, block.mean(axis=1, dtype=np.float32)
            _check_length(path, stated=file.frames / rate, decoded=read / rate)


def _check_riff_length(path: Path, file: Any) -> None:
    """libsndfile shortens a cut WAV or AIFF file to what is there and tells so only in its log."""
    for stated, found in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info):
        if int(found) < int(stated) < _UNKNOWN_LENGTH and file.frames:
            share = int(stated) / max(int(found), 1)
            seconds = file.frames / file.samplerate
            _check_length(path, stated=seconds * share, decoded=seconds)


def _check_length(path: Path, *, stated: float, decoded: float) -> None:
    if stated - decoded > min(_LOST_SECONDS, stated / 2):
        raise AudioError(path, f"corrupt or cut short: {decoded:.1f} s of {stated:.1f} s could be decoded")


def _decode_av(path: Path) -> Iterator[tuple[int, Samples]]:
    av = extras.require("av")
    form, rate = RAW_FORMATS.get(path.suffix.lower(), (None, 0))
    # "file:" and the whitelist keep a hostile playlist or file name from opening a network address.
    options = {"protocol_whitelist": "file"} | ({"sample_rate": str(rate)} if rate else {})
    try:
        container = av.open(f"file:{path}", format=form, options=options, metadata_errors="replace")
    except Exception as error:  # On random bytes PyAV also raises ZeroDivisionError and EOFError.
        raise AudioError(path, f"not a recording of a known format, or damaged: {_cause(error)}") from error
    with container:
        if not container.streams.audio:
            raise AudioError(path, "no audio: the file holds no audio track")
        stream = container.streams.audio[0]
        decoded, lost, damaged = 0.0, 0.0, False
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except Exception as error:
                raise AudioError(path, f"corrupt or cut short after {decoded:.1f} s: {_cause(error)}") from error
            try:
                frames = packet.decode()
            except Exception:  # Players go on after a damaged packet; what it held is counted and judged at the end.
                damaged = True
                lost += float((packet.duration or 0) * packet.time_base) if packet.time_base else 0.0
                continue
            for frame in frames:
                decoded += frame.samples / frame.sample_rate
                yield frame.sample_rate, _mono(frame)
        if damaged and not decoded:
            raise AudioError(path, "corrupt: nothing in it could be decoded")
        _check_length(path, stated=decoded + lost, decoded=decoded)
        if (stated := _stated_seconds(path, container, stream)) is not None:
            _check_length(path, stated=stated, decoded=decoded)


def _stated_seconds(path: Path, container: Any, stream: Any) -> float | None:
    """Length of the audio track by the header, for the containers whose headers can be trusted to state it."""
    formats = container.format.name.split(",")
    if stream.duration is not None and ("mp4" in formats or ("mp3" in formats and _has_info_frame(path))):
        return float(stream.duration * stream.time_base)
    if "matroska" in formats:
        if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, tag.groups())
            return hours * 3600 + minutes * 60 + seconds
        if len(container.streams) == 1 and container.duration is not None:
            return float(container.duration) / 1e6
    return None


def _has_info_frame(path: Path) -> bool:
    """Whether an MP3 file counts its frames in its first one (Xing, LAME); FFmpeg only guesses the length otherwise."""
    with path.open("rb") as file:
        tag = file.read(10)
        is_tag = tag[:3] == b"ID3" and len(tag) == 10
        # The size of an ID3 tag (its pictures, mostly) is written in four bytes of seven bits.
        file.seek(
            10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            if is_tag
            else 0
        )
        first = file.read(256)
    return b"Xing" in first or b"Info" in first


def _mono(frame: Any) -> Samples:
    """(samples,) float32 from a frame of any sample format."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        data = data.astype(np.float32) / -float(np.iinfo(data.dtype).min)
    return np.asarray(data.mean(axis=0, dtype=np.float32), dtype=np.float32)


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
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + rate], format="flt", layout="mono")
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


def _cause(error: Exception) -> str:
    """FFmpeg's words without the error number and the path, which the report states anyway."""
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
