"""What several tests of the Llama-MTSK recipes for real speech begin with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.asr.tiny_dllm import speech
from tests.recipes.mtsk_speech import SILENCE, SIZES, TEXTS, start, write_whisper
from tests.recipes.test_mtsk_recipes import run


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings with a manifest, a start from a Whisper, and the states of two passes."""
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for i in range(6):
        soundfile.write(folder / f"{i}.flac", speech(1.0, i).numpy().astype(np.float32), 16_000)
        seconds = 31.0 if i == 5 else 1.0
        split = "dev" if i == 4 else "train"
        row = {"audio_filepath": f"{i}.flac", "duration": seconds, "text": TEXTS[i % 4], "split": split}
        lines.append(json.dumps(row) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    write_whisper(folder / "whisper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "QUOTES", ("\u0120the", "\u0120no piece"))  # the small tokenizer has no quotation marks
        run(patch, "speech_start", folder / "whisper", folder / "manifest.jsonl", folder / "start", *SIZES, *SILENCE)
        for _ in range(2):
            options = ("--whisper", folder / "whisper", "--passes", 0, 1, *SILENCE)
            run(patch, "speech_states", folder / "manifest.jsonl", folder / "states", *options)
    return folder


@pytest.fixture(scope="session")
def taught(parts: Path) -> Path:
    """A decoder and projectors after some steps, in two runs."""
    with pytest.MonkeyPatch.context() as patch:
        own = (*SIZES, "--every", 10, "--decoder-rate", 3e-3, "--projector-rate", 1e-3)
        for steps in (20, 40):
            run(patch, "speech_decoder", parts / "whisper", parts / "states", parts / "taught", *own, "--steps", steps)
    return parts / "taught/taught.safetensors"
