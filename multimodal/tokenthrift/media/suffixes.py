"""Names of media files, without importing anything that could read them: a folder is walked before torch is loaded."""

from typing import Final

__all__ = ["IMAGE_SUFFIXES", "MEDIA_SUFFIXES", "RAW_FORMATS", "VIDEO_SUFFIXES"]

_SOUND: Final = """
aac ac3 aif aifc aiff amr ape au caf dts eac3 flac g722 gsm m4a m4b mka mp2 mp3 oga ogg opus rf64 snd spx tta w64 wav
wave wma wv
"""
_IMAGE: Final = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
_VIDEO: Final = "3g2 3gp asf avi m2ts m4v mkv mov mp4 mpeg mpg mts ogv webm wmv"

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

VIDEO_SUFFIXES: Final = frozenset(f".{name}" for name in _VIDEO.split())
"""Suffixes, in lower case, under which moving pictures are looked for in folders."""

IMAGE_SUFFIXES: Final = frozenset(f".{name}" for name in _IMAGE.split())
"""Suffixes, in lower case, under which pictures are looked for in folders."""
