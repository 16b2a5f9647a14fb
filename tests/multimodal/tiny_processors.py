"""Folders of tiny random vision-language models with processors of transformers: what a user's own model looks like."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.multimodal.tiny_families import build as family
from tests.multimodal.tiny_media import AUDIO, AUDIO_END, AUDIO_START, MELS
from tests.multimodal.tiny_vlms import END, IMAGE, PAD, SIZE, START, VIDEO, VOCABULARY, build

CHARACTERS = string.ascii_letters + string.digits + " .,:?!'<>|_"
PARTS = (
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}"
    "{% elif content['type'] == 'image' %}IMAGE{% else %}VIDEO{% endif %}{% endfor %}"
)
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: " + PARTS + " {% endfor %}assistant: "


def tokenizer(names: dict[int, str], **roles: str) -> PreTrainedTokenizerFast:
    """A token for each character, after the special ones."""
    first = max(4, *names) + 1
    vocabulary = {names.get(i, f"<{i}>"): i for i in range(first)}
    vocabulary |= {character: first + i for i, character in enumerate(CHARACTERS)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), VOCABULARY)}
    inner: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(names.values()))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=names[PAD], eos_token=names.get(END), **roles)


def _save_qwen(folder: Path, processor: Any, video_processor: Any, model: Any) -> str:
    names = {PAD: "<|pad|>", START: "<|vision_start|>", END: "<|vision_end|>", IMAGE: "<|image_pad|>"}
    names[VIDEO] = "<|video_pad|>"
    sizes: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer(names),
        video_processor=video_processor(**sizes),
        chat_template=template.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def save_qwen(folder: Path) -> str:
    """A Qwen2.5-VL."""
    return _save_qwen(folder, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, build("qwen2_5_vl"))


def save_qwen3(folder: Path) -> str:
    """A Qwen3-VL."""
    return _save_qwen(folder, Qwen3VLProcessor, Qwen3VLVideoProcessor, family("qwen3_vl"))


def save_llava(folder: Path) -> str:
    """A LLaVA-OneVision."""
    model = build("llava_onevision")
    names = {PAD: "<|pad|>", START: "<s>", END: "</s>", IMAGE: "<image>", VIDEO: "<video>"}
    size = {"height": SIZE, "width": SIZE}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=model.config.image_grid_pinpoints),
        tokenizer=tokenizer(names),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIZE // 4) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>\n").replace("VIDEO", "<video>\n"),
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def save_llava_of_pictures(folder: Path) -> str:
    """A LLaVA 1.5: its processor knows no video."""
    names = {PAD: "<|pad|>", START: "<s>", END: "</s>", IMAGE: "<image>"}
    size = {"height": SIZE, "width": SIZE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size),
        tokenizer=tokenizer(names),
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
    ).save_pretrained(folder)
    family("llava").save_pretrained(folder)
    return str(folder)


def save_internvl(folder: Path) -> str:
    """An InternVL: the frames of a clip are pictures one behind the other."""
    names = {PAD: "<|pad|>", START: "<img>", END: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"}
    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    size = {"height": SIZE, "width": SIZE}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tokenizer(names, **roles, video_token="<video>"),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n").replace("VIDEO", "<video>\n"),
    ).save_pretrained(folder)
    family("internvl").save_pretrained(folder)
    return str(folder)


def save_qwen2_audio(folder: Path) -> str:
    """A Qwen2-Audio that hears the first second."""
    names = {PAD: "<|pad|>", AUDIO_START: "<|audio_bos|>", AUDIO_END: "<|audio_eos|>", AUDIO: "<|AUDIO|>"}
    Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=16_000 // MELS),
        tokenizer=tokenizer(names),
        chat_template=TEMPLATE.replace("VIDEO", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
    ).save_pretrained(folder)
    family("qwen2_audio").save_pretrained(folder)
    return str(folder)
