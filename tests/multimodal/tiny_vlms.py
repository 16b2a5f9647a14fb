"""Vision-language models of transformers with tiny random weights, and prompts for them without a processor.

A prompt is a row of text ids, pictures and clips. `encode` writes the placeholders that the family's processor would
write, pads the rows, and adds the pixels. Pixels depend on the seed of the picture alone, so that a row means the
same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

PAD, START, END, IMAGE, VIDEO, VOCABULARY = 0, 1, 2, 3, 4, 97
SIZE = 16


@dataclass(frozen=True)
class Picture:
    """A picture of `height` x `width` pixels, multiples of 16."""

    seed: int
    height: int = 16
    width: int = 16


@dataclass(frozen=True)
class Clip:
    """A clip of 16 x 16 pixels; all clips of a batch have as many frames."""

    seed: int
    frames: int = 4


Row = Sequence[int | Picture | Clip]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(family: str, seed: int = 0, attention: str = "sdpa") -> Any:
    """A model in evaluation mode whose outputs depend visibly on everything it reads."""
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    ids: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO, "attn_implementation": attention}
    config: Any
    if family == "llava_onevision":
        vision = SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=4,
            vision_use_head=False,
        )
        grid = [[SIZE * h, SIZE * w] for h in (1, 2) for w in (1, 2)]
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config=Qwen2Config(**text), image_grid_pinpoints=grid, **ids
        )
    else:
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        vision_config: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
        if family == "qwen2_vl":
            vision_config["embed_dim"] = 32
        else:
            vision_config |= {
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            }
        config_class = Qwen2VLConfig if family == "qwen2_vl" else Qwen2_5_VLConfig
        config = config_class(
            text_config=text, vision_config=vision_config, vision_start_token_id=START, vision_end_token_id=END, **ids
        )
    torch.manual_seed(seed)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, START, END, IMAGE, VIDEO]
    return model


@cache
def shared(family: str) -> Any:
    """One model per family for all tests that leave it as it is."""
    return build(family)


def encode(model: Any, rows: Sequence[Row], padding: str = "left") -> dict[str, Any]:
    """What the processor would give: ids with placeholders, mask, pixels."""
    pictures = [part for row in rows for part in row if isinstance(part, Picture)]
    clips = [part for row in rows for part in row if isinstance(part, Clip)]
    qwen = model.config.model_type != "llava_onevision"
    pixels = (_qwen_pixels if qwen else _llava_pixels)(model, rows, pictures, clips)
    counts: dict[int | Picture | Clip, int] = {
        **dict(zip(pictures, map(len, features(model, "image", pixels)), strict=True)),
        **dict(zip(clips, map(len, features(model, "video", pixels)), strict=True)),
    }
    ids = []
    for row in rows:
        line: list[int] = []
        for part in row:
            if isinstance(part, int):
                line.append(part)
            else:
                slots = [IMAGE if isinstance(part, Picture) else VIDEO] * counts[part]
                line += [START, *slots, END] if qwen else slots
        ids.append(line)
    width = max(map(len, ids))
    left = padding == "left"
    padded = [[PAD] * (width - len(i)) + i if left else i + [PAD] * (width - len(i)) for i in ids]
    real = [[0] * (width - len(i)) + [1] * len(i) if left else [1] * len(i) + [0] * (width - len(i)) for i in ids]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(real), **pixels}
    if qwen:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    return inputs


def features(model: Any, modality: str, inputs: dict[str, Any]) -> list[Tensor]:
    """What the encoder makes of every picture ("image") or clip ("video") of the inputs: (N_i, D) each."""
    name = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
    if name not in inputs:
        return []
    keys = (f"{modality}_grid_thw", *(("image_sizes", "batch_num_images") if modality == "image" else ()))
    with torch.no_grad():
        encoded = getattr(model, f"get_{modality}_features")(
            inputs[name], **{k: inputs[k] for k in keys if k in inputs}
        )
    return list(encoded.pooler_output)


def _llava_pixels(
    model: Any, rows: Sequence[Row], pictures: Sequence[Picture], clips: Sequence[Clip]
) -> dict[str, Any]:
    pixels: dict[str, Any] = {}
    if pictures:
        grid = model.config.image_grid_pinpoints
        single = [n == 1 for row in rows if (n := sum(isinstance(p, Picture) for p in row)) for _ in range(n)]
        patches = [
            image_size_to_num_patches([p.height, p.width], grid, SIZE) if alone else 1
            for p, alone in zip(pictures, single, strict=True)
        ]
        values = torch.zeros(len(pictures), max(patches), 3, SIZE, SIZE)
        for i, (picture, n) in enumerate(zip(pictures, patches, strict=True)):
            values[i, :n] = noise(picture.seed, n, 3, SIZE, SIZE)
        pixels["pixel_values"] = values
        pixels["image_sizes"] = torch.tensor([[p.height, p.width] for p in pictures])
        pixels["batch_num_images"] = torch.tensor([sum(isinstance(p, Picture) for p in row) for row in rows])
    if clips:
        pixels["pixel_values_videos"] = torch.stack([noise(c.seed, c.frames, 3, SIZE, SIZE) for c in clips])
    return pixels


def _qwen_pixels(model: Any, rows: Sequence[Row], pictures: Sequence[Picture], clips: Sequence[Clip]) -> dict[str, Any]:
    pixels: dict[str, Any] = {}
    kinds: tuple[tuple[str, Sequence[Picture | Clip]], ...] = (("image", pictures), ("video", clips))
    for name, items in kinds:
        if items:
            grids = [_grid(item) for item in items]
            values = [noise(item.seed, t * h * w, 96) for item, (t, h, w) in zip(items, grids, strict=True)]
            pixels["pixel_values" if name == "image" else "pixel_values_videos"] = torch.cat(values)
            pixels[f"{name}_grid_thw"] = torch.tensor(grids)
    return pixels


def _grid(item: Picture | Clip) -> tuple[int, int, int]:
    """Patches of 4 pixels and 2 frames."""
    return (1, item.height // 4, item.width // 4) if isinstance(item, Picture) else (item.frames // 2, 4, 4)


# Unequal pictures, two of them side by side, a clip, and a row of text only.
ROWS: list[Row] = [
    [10, 11, Picture(1, 16, 32), 12, 13],
    [20, Picture(2), Picture(3), 21, 22, 23, 24],
    [30, 31, 32],
    [40, Clip(4), 41, Picture(5, 32, 32), 42, 43],
    [50, Clip(6), 51],
]


def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, **kwargs).logits
    return out


def generated(model: Any, inputs: dict[str, Any], tokens: int = 3, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The new ids (B, tokens), and the logits they were chosen by (B, tokens, V)."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        **({"do_sample": False} | kwargs),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1)


def projector(model: Any) -> Any:
    """The last module that runs before visual features stand in their placeholders."""
    return model.model.multi_modal_projector if hasattr(model.model, "multi_modal_projector") else model.model.visual
