"""Talking-face video files of any frame rate and length, with or without sound, and a tiny model in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.asr.tiny_dllm import write_whisper
from tests.asr.tiny_mtsk import CHARACTERS
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert

Pictures = NDArray[np.uint8]


def write_video(
    path: Path, frames: Pictures, fps: int = 25, samples: Tensor | None = None, rate: int = 16_000, channels: int = 1
) -> Path:
    """Writes frames (T, H, W) of grey and, beside them, samples (n,) at a rate, the same in each channel."""
    with av.open(str(path), "w") as out:
        picture: Any = out.add_stream("ffv1", rate=fps)
        picture.height, picture.width, picture.pix_fmt = *frames.shape[1:], "gray"
        sound: Any = None
        if samples is not None:
            layout = "mono" if channels == 1 else "stereo"
            sound = out.add_stream("pcm_s16le", rate=rate, layout=layout)
        for image in frames:
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="gray")))
        out.mux(picture.encode(None))
        if samples is not None:
            whole = (samples.clamp(-1, 1) * 32767).to(torch.int16).numpy()
            frame = av.AudioFrame.from_ndarray(np.repeat(whole, channels)[None], format="s16", layout=layout)
            frame.sample_rate = rate
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def face(
    side: int = 80, size: tuple[int, int] = (180, 240), left: int = 60, top: int = 40, mouth: int = 255
) -> Pictures:
    """(H, W) a picture with a grey square for a face and a patch of a given grey where its mouth is."""
    picture = np.full(size, 20, np.uint8)
    picture[top : top + side, left : left + side] = 120
    y, x = top + round(0.78 * side), left + side // 2
    picture[y - 4 : y + 4, x - 8 : x + 8] = mouth
    return picture


class SquareFinder:
    """Finds the square of `face` in place of a real face, exactly."""

    def find(self, picture: Pictures) -> tuple[float, float, float] | None:
        rows, columns = (np.flatnonzero((picture == 120).any(axis)) for axis in (1, 0))
        return (float(columns[0]), float(rows[0]), float(len(columns))) if len(rows) else None


def write_parts(folder: Path) -> dict[str, str]:
    """Folders of a tiny Whisper, visual encoder and Llama with random weights, as arguments of `MtskModule`."""
    write_whisper(folder / "whisper")
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)} | {"<s>": len(CHARACTERS), "</s>": len(CHARACTERS) + 1}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "llama")
        tokenizer.save(str(folder / "llama" / "tokenizer.json"))
        encoder = AvHubert(64, 1, 1, 96, (4, 4, 8, 8))
        (folder / "avhubert").mkdir()
        save_file(encoder.state_dict(), folder / "avhubert" / "avhubert.safetensors")
    names = {"whisper": "whisper", "avhubert": "avhubert", "language_model": "llama"}
    return {name: str(folder / part) for name, part in names.items()} | {"bos": "<s>", "eos": "</s>"}


def write_states(path: Path, texts: list[str], audio: int = 32, video: int = 64, **said: str) -> Path:
    """A shard of states of which a learner can tell the letters: six of audio and three of video for each.

    Args:
        path: of the shard.
        texts: of its items.
        audio: width of states of sound.
        video: width of states of lips.
        said: more metadata.
    """
    letters = torch.randn(128, audio + video, generator=torch.Generator().manual_seed(5))
    tensors: dict[str, Tensor] = {}
    for name, columns, count in (("audio", slice(0, audio), 6), ("video", slice(audio, None), 3)):
        rows = [letters[torch.tensor([*text.encode()])][:, columns].repeat_interleave(count, 0) for text in texts]
        tensors[name] = torch.cat(rows).half()
        tensors[f"{name}_offset"] = torch.tensor([0, *map(len, rows)]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"texts": json.dumps(texts), **said})
    return path
