"""Names of media files, without importing anything that could read them: a folder is walked before torch is loaded."""

from typing import Final

__all__ = ["IMAGE_SUFFIXES", "MEDIA_SUFFIXES", "RAW_FORMATS", "VIDEO_SUFFIXES"]

_SOUND: Final = """
aac ac3 aif aifc aiff amr ape au caf dts eac3 flac g722 gsm m4a m4b mka mp2 mp3 oga ogg opus rf64 snd spx tta w64 wav
wave wma wv
"""
_IMAGE: Final = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
_VIDEO: Final = """
3g2 3gp asf avi divx dv f4v flv gxf ismv m2p m2t m2ts m4v mk3d mkv mov mp4 mpe mpeg mpg mts mxf nut ogm ogv qt rm rmvb
trp vob webm wmv wtv
"""
# Moving pictures among which nobody looks for speech: no container for sound, or a name that text has more often (ts).
_SILENT: Final = "264 265 apng gif h264 hevc ivf m1v m2v mjpeg mjpg mpv obu ts y4m"

RAW_FORMATS: Final = {
    ".ul": ("mulaw", 8000),
    ".ulaw": ("mulaw", 8000),
    ".al": ("alaw", 8000),
    ".alaw": ("alaw", 8000),
    ".sln": ("s16le", 8000),
    ".sln16": ("s16le", 16000),
}
"""How a headerless telephone format is to be read: FFmpeg's name of it and its sample rate."""

MEDIA_SUFFIXES: Final = frozenset(f".{name}" for name in (_SOUND + _VIDEO).split()) | frozenset(RAW_FORMATS)
"""Suffixes, in lower case, under which recordings are looked for in folders; others can still be read by name."""

VIDEO_SUFFIXES: Final = frozenset(f".{name}" for name in (_VIDEO + _SILENT).split())
"""Suffixes, in lower case, under which moving pictures are looked for in folders."""

IMAGE_SUFFIXES: Final = frozenset(f".{name}" for name in _IMAGE.split())
"""Suffixes, in lower case, under which pictures are looked for in folders."""
