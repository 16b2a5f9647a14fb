"""eSpeak NG as a library: samples of speech, and the sample at which each phoneme starts.

`espeak-ng --pho` prints nothing for the ordinary voices, but libespeak-ng sends phoneme events to its callback (the
flag `espeakINITIALIZE_PHONEME_EVENTS` of `speak_lib.h`), which is all that lips in step with the sound need. One voice
speaks at a time in a process: the library holds its state in globals. It is the system's (Debian: `apt-get install
espeak-ng`), and where there is none that of the Python package `espeakng-loader`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

SYNCHRONOUS, PHONEME_EVENTS, UTF8, PHONEME = 2, 1, 1, 7
RATE, PITCH, RANGE, WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER
STRESS = "',%"  # Some builds of the library put its marks before the vowel; lips do not need them.


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, slots=True)
class Voice:
    """How to speak.

    Attributes:
        name: language and variant, as in `en-gb+f2`.
        pitch: 0 to 99; 50 is the voice's own.
        range: of the pitch, 0 (monotone) to 99.
        rate: words a minute.
        gap: pause between words, in units of 10 ms.
    """

    name: str
    pitch: int = 50
    range: int = 50
    rate: int = 160
    gap: int = 0


@dataclass(frozen=True, slots=True)
class Spoken:
    """Samples in [-1, 1] at `rate` a second, and (first sample, name) of each phoneme; names of pauses start with _."""

    samples: np.ndarray
    rate: int
    phonemes: list[tuple[int, str]]


def _library() -> tuple[ctypes.CDLL, bytes | None]:
    """The library and the folder of its data, None where the library knows that itself."""
    try:
        return ctypes.CDLL("libespeak-ng.so.1"), None
    except OSError as error:
        if importlib.util.find_spec("espeakng_loader") is None:
            raise RuntimeError(
                "libespeak-ng is not installed: apt-get install espeak-ng, or pip install espeakng-loader"
            ) from error
    import espeakng_loader

    return ctypes.CDLL(espeakng_loader.get_library_path()), espeakng_loader.get_data_path().encode()


class _Engine:
    def __init__(self) -> None:
        self.library, data = _library()
        self.rate: int = self.library.espeak_Initialize(SYNCHRONOUS, 0, data, PHONEME_EVENTS)
        if self.rate <= 0:
            raise RuntimeError("libespeak-ng did not start: its data was not found")
        self.pieces: list[np.ndarray] = []
        self.phonemes: list[tuple[int, str]] = []
        self.callback = _Callback(self._receive)  # kept, or it is freed while the library holds it
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0 and samples:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == PHONEME:
                name = ctypes.string_at(ctypes.addressof(events[i].id), 8).split(b"\0")[0].decode()
                self.phonemes.append((events[i].sample, name.lstrip(STRESS)))
            i += 1
        return 0


@cache
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: Voice) -> Spoken:
    """One text by one voice.

    Raises:
        ValueError: there is no such voice.
        RuntimeError: the library did not speak.
    """
    engine = _engine()
    library = engine.library
    engine.pieces.clear()
    engine.phonemes.clear()
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice.name!r}")
    settings = ((RATE, voice.rate), (PITCH, voice.pitch), (RANGE, voice.range), (WORD_GAP, voice.gap))
    for parameter, value in settings:
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode() + b"\0"
    if library.espeak_Synth(data, len(data), 0, 1, 0, UTF8, None, None) != 0 or not engine.pieces:
        raise RuntimeError(f"eSpeak NG could not speak {text!r}")
    samples = np.concatenate(engine.pieces).astype(np.float32) / 32768
    return Spoken(samples, engine.rate, list(engine.phonemes))
