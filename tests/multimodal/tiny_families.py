"""One tiny random model of every family that `attach` knows, and prompts for it without a processor.

A prompt is a row of text ids and media. Every item stands between a START and an END, as processors write it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.multimodal.tiny_configs import (
    DEEPSEEK,
    GRID,
    MARKS,
    MROPE,
    PLACEHOLDERS,
    ROPE,
    WHISPER,
    audio_tower,
    llava,
    qwen_tower,
    text,
    tower,
)
from tests.multimodal.tiny_media import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    MELS,
    Inputs,
    Recording,
    Row,
    anyres,
    gemma,
    granite,
    granite_count,
    kimi,
    mels,
    merged,
    omni,
    packed,
    padded_tiles,
    paligemma,
    parts,
    pixtral,
    qwen,
    square,
    tiles,
    video_llava,
    whisper_like,
)
from tests.multimodal.tiny_vlms import END, IMAGE, PAD, SIZE, START, VIDEO, Clip, Picture

WIDE = ((16, 32), (16, 16))


@dataclass(frozen=True)
class Tiny:
    """How a family is built, what it reads, how many tokens an item has, and how items become arguments."""

    config: Callable[[], Any]
    reads: tuple[type, ...]
    count: Callable[[Any], int]
    inputs: Callable[[Sequence[Row], Tensor], Inputs]
    sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    frames_apart: bool = False
    """Whether a START and an END stand around every frame of a clip."""


TINY: dict[str, Tiny] = {
    "llava": Tiny(llava(hf.LlavaConfig, image_seq_length=16), (Picture,), lambda p: 16, square),
    "llava_next": Tiny(llava(hf.LlavaNextConfig, image_grid_pinpoints=GRID), (Picture,), packed, anyres, WIDE),
    "llava_next_video": Tiny(
        llava(hf.LlavaNextVideoConfig, image_grid_pinpoints=GRID), (Picture, Clip), packed, anyres, WIDE
    ),
    "llava_onevision": Tiny(
        llava(
            hf.LlavaOnevisionConfig,
            "siglip_vision_model",
            "qwen2",
            image_grid_pinpoints=GRID,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        (Picture, Clip),
        lambda item: packed(item) + isinstance(item, Clip),
        anyres,
        WIDE,
    ),
    "video_llava": Tiny(
        llava(hf.VideoLlavaConfig),
        (Picture, Clip),
        lambda item: item.frames * 17 if isinstance(item, Clip) else 16,
        video_llava,
    ),
    "qwen2_vl": Tiny(
        lambda: hf.Qwen2VLConfig(text_config=MROPE, vision_config=qwen_tower(embed_dim=16), **PLACEHOLDERS, **MARKS),
        (Picture, Clip),
        merged,
        qwen,
        WIDE,
    ),
    "qwen2_5_vl": Tiny(
        lambda: hf.Qwen2_5_VLConfig(
            text_config=MROPE,
            vision_config=qwen_tower(out_hidden_size=16, window_size=16, fullatt_block_indexes=[1]),
            **PLACEHOLDERS,
            **MARKS,
        ),
        (Picture, Clip),
        merged,
        qwen,
        WIDE,
    ),
    "qwen3_vl": Tiny(
        lambda: hf.Qwen3VLConfig(
            text_config=text(rope_parameters={**ROPE, "mrope_interleaved": True}),
            vision_config=qwen_tower(out_hidden_size=16, deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
            **PLACEHOLDERS,
            **MARKS,
        ),
        (Picture, Clip),
        merged,
        qwen,
        WIDE,
        frames_apart=True,
    ),
    "qwen2_5_omni_thinker": Tiny(
        lambda: hf.Qwen2_5OmniThinkerConfig(
            text_config=MROPE,
            vision_config=qwen_tower(out_hidden_size=16, window_size=16, fullatt_block_indexes=[1]),
            audio_config={
                "num_mel_bins": 8,
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "n_window": 8,
                "output_dim": 16,
                "max_source_positions": MELS // 2,
            },
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=AUDIO,
            audio_start_token_id=AUDIO_START,
            audio_end_token_id=AUDIO_END,
            **MARKS,
        ),
        (Picture, Clip, Recording),
        lambda item: whisper_like(item) if isinstance(item, Recording) else merged(item),
        omni,
        WIDE,
    ),
    "internvl": Tiny(
        lambda: hf.InternVLConfig(
            vision_config=tower("internvl_vision"), text_config=text("qwen2"), image_token_id=IMAGE, image_seq_length=4
        ),
        (Picture,),
        lambda p: 4 * p.width // SIZE,
        tiles,
        WIDE,
    ),
    "idefics3": Tiny(
        lambda: hf.Idefics3Config(
            vision_config=tower("idefics3_vision"), text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
        ),
        (Picture,),
        lambda p: 4,
        padded_tiles,
    ),
    "smolvlm": Tiny(
        lambda: hf.SmolVLMConfig(
            vision_config=tower("smolvlm_vision"), text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
        ),
        (Picture,),
        lambda p: 4,
        padded_tiles,
    ),
    "gemma3": Tiny(
        lambda: hf.Gemma3Config(
            vision_config=tower("siglip_vision_model", vision_use_head=False),
            text_config=text(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        (Picture,),
        lambda p: 16,
        gemma,
    ),
    "paligemma": Tiny(
        lambda: hf.PaliGemmaConfig(
            vision_config=tower("siglip_vision_model", vision_use_head=False, projection_dim=16),
            text_config=text("gemma"),
            image_token_index=IMAGE,
            projection_dim=16,
            hidden_size=16,
        ),
        (Picture,),
        lambda p: 16,
        paligemma,
    ),
    "mistral3": Tiny(
        lambda: hf.Mistral3Config(
            vision_config=tower("pixtral", image_size=2 * SIZE, head_dim=8),
            text_config=text("mistral"),
            image_token_index=IMAGE,
        ),
        (Picture,),
        merged,
        pixtral,
        WIDE,
    ),
    "glm4v": Tiny(
        lambda: hf.Glm4vConfig(
            text_config=text(rope_parameters=ROPE),
            vision_config=qwen_tower(out_hidden_size=16, image_size=SIZE),
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=6,
            video_end_token_id=7,
            **PLACEHOLDERS,
        ),
        (Picture,),
        merged,
        qwen,
        WIDE,
    ),
    "kimi_k25": Tiny(
        lambda: hf.Kimi_K25Config(
            text_config=text("deepseek_v3", **DEEPSEEK),
            vision_config={
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            projection_hidden_size=16,
            **PLACEHOLDERS,
            **MARKS,
        ),
        (Picture,),
        merged,
        kimi,
        WIDE,
    ),
    "qwen2_audio": Tiny(
        lambda: hf.Qwen2AudioConfig(
            audio_config=audio_tower(
                "qwen2_audio_encoder", d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24
            ),
            text_config=text("qwen2"),
            audio_token_index=AUDIO,
        ),
        (Recording,),
        whisper_like,
        lambda rows, ids: mels(rows, mask="feature_attention_mask"),
    ),
    "voxtral": Tiny(
        lambda: hf.VoxtralConfig(
            audio_config=audio_tower("voxtral_encoder", **WHISPER), text_config=text("llama"), audio_token_id=AUDIO
        ),
        (Recording,),
        lambda r: MELS // 2 // 4,
        lambda rows, ids: mels(rows),
    ),
    "audioflamingo3": Tiny(
        lambda: hf.AudioFlamingo3Config(
            audio_config=audio_tower("audioflamingo3_encoder", **WHISPER),
            text_config=text("qwen2"),
            audio_token_id=AUDIO,
        ),
        (Recording,),
        whisper_like,
        lambda rows, ids: mels(rows, mask="input_features_mask"),
    ),
    "granite_speech": Tiny(
        lambda: hf.GraniteSpeechConfig(
            encoder_config={
                "input_dim": 8,
                "num_layers": 1,
                "hidden_dim": 16,
                "num_heads": 2,
                "dim_head": 8,
                "output_dim": 8,
                "context_size": 16,
                "max_pos_emb": 16,
                "conv_kernel_size": 3,
                "dropout": 0.0,
            },
            projector_config=hf.AutoConfig.for_model(
                "blip_2_qformer",
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                encoder_hidden_size=16,
                vocab_size=8,
            ),
            text_config=text("granite"),
            audio_token_index=AUDIO,
            has_lora_adapter=False,
            downsample_rate=2,
            window_size=8,
        ),
        (Recording,),
        granite_count,
        granite,
    ),
}


def build(family: str, attention: str = "sdpa") -> Any:
    """A model in evaluation mode whose outputs depend visibly on everything it reads."""
    tiny = TINY[family]
    if family == "qwen2_5_omni_thinker":
        auto: Any = hf.Qwen2_5OmniThinkerForConditionalGeneration._from_config
    elif family == "audioflamingo3":
        auto = hf.AudioFlamingo3ForConditionalGeneration._from_config
    elif tiny.reads == (Recording,):
        auto = hf.AutoModelForMultimodalLM.from_config
    else:
        auto = hf.AutoModelForImageTextToText.from_config
    torch.manual_seed(0)
    model = auto(tiny.config(), attn_implementation=attention)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, START, END, IMAGE, VIDEO, AUDIO]
    return model


@cache
def shared(family: str) -> Any:
    """One model per family for all tests that leave it as it is."""
    return build(family)


def rows_of(family: str) -> list[Row]:
    """Prompts of unequal length: one item, several of them, and text alone."""
    tiny = TINY[family]
    first, last = tiny.sizes[0], tiny.sizes[-1]
    if tiny.reads == (Recording,):
        return [[10, 11, Recording(1, 40), 12], [20, Recording(2), 21, Recording(3, 24), 22, 23], [30, 31, 32]]
    more: Row = [40, Clip(4), 41] if Clip in tiny.reads else [40, Picture(4, *first), 41]
    if Recording in tiny.reads:
        more = [*more, Recording(5, 40), 42]
    return [[10, 11, Picture(1, *first), 12], [20, Picture(2, *last), 21, Picture(3, *first), *more, 43], [30, 31, 32]]


def encode(family: str, rows: Sequence[Row], padding: str = "left") -> Inputs:
    """What the processor would give: ids with placeholders, mask, pixels or spectrograms."""
    tiny, lines = TINY[family], []
    for row in rows:
        line: list[int] = []
        for part in row:
            if isinstance(part, int):
                line.append(part)
            else:
                slot = {Picture: IMAGE, Clip: VIDEO, Recording: AUDIO}[type(part)]
                segments = part.frames // 2 if isinstance(part, Clip) and tiny.frames_apart else 1
                start, end = (AUDIO_START, AUDIO_END) if isinstance(part, Recording) else (START, END)
                line += [start, *[slot] * (tiny.count(part) // segments), end] * segments
        lines.append(line)
    width, left = max(map(len, lines)), padding == "left"
    ids = torch.tensor([[PAD] * (width - len(i)) + i if left else i + [PAD] * (width - len(i)) for i in lines])
    given = tiny.inputs(rows, ids) if any(parts(rows, kind) for kind in tiny.reads) else {}
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **given}
