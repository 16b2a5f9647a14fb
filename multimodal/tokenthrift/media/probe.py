"""What a file is and how much of it there is, from its headers and packets; nothing is decoded.

    probe("talk.mp4")    # kind "talking video", ItemSize(seconds=61.2, frames=1530, height=720, width=1280)

What a file is follows from its content, whatever its name. A length that no header states (ADTS, MP3 without an Info
frame, transport streams) is that of the packets.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import soundfile

from tokenthrift import extras
from tokenthrift.item_size import ItemSize
from tokenthrift.media.audio_track import AudioError, reads_by_libsndfile
from tokenthrift.media.container import opened, preferred, start_of
from tokenthrift.media.errors import MediaError
from tokenthrift.media.image import image_size
from tokenthrift.media.kinds import kind_of
from tokenthrift.media.picture_track import VideoInfo
from tokenthrift.media.picture_track import probe as probe_video
from tokenthrift.media.suffixes import RAW_FORMATS

__all__ = ["Probe", "ProbeKind", "probe"]

# A FLAC frame of silence holds 65,535 samples in 10 bytes or more; no codec holds more.
_SAMPLES_PER_BYTE: Final = 6554

ProbeKind: TypeAlias = Literal["image", "video", "audio", "talking video"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A file before anything runs.

    Attributes:
        path: the file.
        kind: image, video (without sound), audio, or talking video (both).
        size: height and width of an image; frames, height and width of a video; seconds of all but images, where both
            tracks of a talking video are counted from second 0 of the file to the end of the later one.
        video: what is known of the picture track, if there is one.
    """

    path: Path
    kind: ProbeKind
    size: ItemSize
    video: VideoInfo | None = None


def probe(path: str | Path) -> Probe:
    """Tells what a file is; an animation of one frame or more is an image.

    Raises:
        MediaError: it is no picture, sound or film, or is damaged or cut short.
        MissingExtraError: PyAV or Pillow is needed and not installed.
    """
    path = Path(path)
    if kind_of(path) in ("picture", "animation"):
        height, width = image_size(path)
        return Probe(path=path, kind="image", size=ItemSize(height=height, width=width))
    if reads_by_libsndfile(path) and (seconds := _sndfile_seconds(path)) > 0:
        return Probe(path=path, kind="audio", size=ItemSize(seconds=seconds))
    form, rate = RAW_FORMATS.get(path.suffix.lower(), (None, 0))
    options = {"sample_rate": str(rate)} if rate else None
    with opened(path, MediaError, "a picture, recording or film", form=form, options=options) as container:
        cover = extras.require("av").stream.Disposition.attached_pic
        pictures = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not pictures and not container.streams.audio:
            raise MediaError(path, "neither pictures nor sound in it")
        sound = _sound_seconds(path, container) if container.streams.audio else 0.0
    if not pictures:
        if not sound:
            raise AudioError(path, "empty: no audio samples")
        return Probe(path=path, kind="audio", size=ItemSize(seconds=sound))
    video = probe_video(path)
    size = ItemSize(seconds=max(video.seconds, sound), frames=video.frames, height=video.height, width=video.width)
    return Probe(path=path, kind="talking video" if video.audio else "video", size=size, video=video)


def _sndfile_seconds(path: Path) -> float:
    with path.open("rb") as handle:
        try:
            with soundfile.SoundFile(handle.fileno(), closefd=False) as file:
                if file.frames > path.stat().st_size * _SAMPLES_PER_BYTE:
                    raise AudioError(path, f"corrupt: claims {file.frames:,} samples in {path.stat().st_size} bytes")
                return float(file.frames / file.samplerate) if file.samplerate else 0.0
        except soundfile.LibsndfileError:
            return 0.0


def _sound_seconds(path: Path, container: Any) -> float:
    """Seconds from second 0 of the file to the end of the sound track that a player takes."""
    stream = preferred(container.streams.audio)
    unit, zero = stream.time_base, start_of(path, container)
    formats = container.format.name.split(",")
    if stream.duration is not None and "mp4" in formats:
        return float(max((stream.start_time or 0) * unit - zero, Fraction(0)) + stream.duration * unit)
    end, counted = Fraction(0), Fraction(0)
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return float(max(end, Fraction(0)) or counted)
        except Exception as error:
            raise AudioError(path, f"corrupt or cut short after {float(end):.1f} s") from error
        if packet.size:
            counted += (packet.duration or 0) * unit
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * unit - zero)
