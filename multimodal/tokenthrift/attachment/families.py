"""The vision and audio language models that `attach` knows: one row a family, and how to add one.

All of them follow one plan: an encoder makes features, these take the place of placeholders among the embeddings of
the prompt, and a language model reads the row. A `Family` says what differs: how the part that holds both is called,
which placeholder stands for what, where one item ends and the next begins, and what else the layers are given that
has an entry for every position or for every feature.

    register_family(Family(model_type="my_speech_llm", media={"audio": Medium(token="audio_token_id")}))

Source: the models of transformers 5; nothing of them is copied. Published plugins write a copy of the forward of every
family instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from tokenthrift.attachment.items import clips, each, recordings

__all__ = ["FAMILIES", "Family", "Medium", "find_model", "register_family"]

Lengths = Callable[[Any, Mapping[str, Any], Any], list[int]]


@dataclass(frozen=True, kw_only=True)
class Medium:
    """Where the tokens of one modality stand."""

    token: str
    """Name of the placeholder's id in the config of the model."""
    inputs: tuple[str, ...] = ("input_features",)
    """Arguments of the model that hold pixels or sound; one of them given means that placeholders stand for media."""
    lengths: Lengths | None = None
    """Tokens of every item from the model, the arguments by name and the output of its encoding method. If None, every
    unbroken run of placeholders is an item."""
    method: str = ""
    """Encoding method of the model, whose calls `lengths` reads."""
    tiles_apart: bool = False
    """Without `lengths`: whether marked tiles and the whole view behind them are one item (`pictures_of_tiles`)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What `attach` has to know of a family of models."""

    model_type: str
    """`config.model_type` of the part that holds encoder and language model."""
    media: Mapping[str, Medium]
    """What the model reads besides text, by modality: "image", "video", "audio", or a name of your own."""
    language: str = "language_model"
    """Attribute of the language model, which is called with `inputs_embeds` (B, L, D) and gives `last_hidden_state`."""
    along: Mapping[str, Literal["positions", "features"]] = field(default_factory=dict)
    """Arguments of the language model that are reduced along: tensors (B, L, ...) with an entry for every position, or
    lists of tensors (V, D) with a row for every position that `visual_pos_masks` marks."""
    towers: tuple[str, ...] = ()
    """Attributes of the vision encoders that can be reduced inside: CLIP, SigLIP and Qwen towers."""
    masks: Callable[[Any, Mapping[str, Any], Tensor | None], Any] | None = None
    """For models that make attention masks in front of the layers: the mask of a shortened row, from the model, the
    arguments of the language model with a (B, K) mask, and the (B, K) token types."""
    first_position: int = 0
    """Position of the first token of a row."""


def _masks(head: str) -> Callable[[Any, Mapping[str, Any], Tensor | None], Any]:
    """Masks that let the tokens of a picture, or of a prefix, see each other in both directions."""

    def build(model: Any, given: Mapping[str, Any], types: Tensor | None) -> Any:
        import transformers

        names = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")
        return getattr(transformers, head).create_masks_for_generate(
            config=model.config, token_type_ids=types, **{name: given.get(name) for name in names}
        )

    return build


_IMAGE = Medium(token="image_token_id", inputs=("pixel_values",), lengths=each, method="get_image_features")
_VIDEO = Medium(token="video_token_id", inputs=("pixel_values_videos",), lengths=each, method="get_video_features")
_TILES = replace(_IMAGE, lengths=None)  # an encoder runs over tiles; a run of placeholders is a picture
_APART = replace(_TILES, tiles_apart=True)
_AUDIO = Medium(token="audio_token_id")
_BOTH = {"image": _IMAGE, "video": _VIDEO}
_TOWER, _VISUAL = ("vision_tower",), ("visual",)
_DEEPSTACK: Mapping[str, Literal["positions", "features"]] = {
    "visual_pos_masks": "positions",
    "deepstack_visual_embeds": "features",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llava", media={"image": _IMAGE}, towers=_TOWER),
        Family(model_type="llava_next", media={"image": _IMAGE}, towers=_TOWER),
        Family(model_type="llava_next_video", media=_BOTH, towers=_TOWER),
        Family(model_type="llava_onevision", media=_BOTH, towers=_TOWER),
        Family(
            model_type="video_llava",
            towers=("image_tower", "video_tower"),
            media={"image": replace(_IMAGE, inputs=("pixel_values_images",)), "video": replace(_VIDEO, lengths=clips)},
        ),
        Family(model_type="qwen2_vl", media=_BOTH, towers=_VISUAL),
        Family(model_type="qwen2_5_vl", media=_BOTH, towers=_VISUAL),
        Family(model_type="qwen3_vl", media=_BOTH, towers=_VISUAL, along=_DEEPSTACK),
        Family(
            model_type="qwen2_5_omni_thinker",
            towers=_VISUAL,
            media={**_BOTH, "audio": replace(_AUDIO, lengths=recordings, method="get_audio_features")},
        ),
        Family(model_type="internvl", media={"image": _TILES}),
        Family(model_type="idefics3", media={"image": _APART}, language="text_model"),
        Family(model_type="smolvlm", media={"image": _APART}, language="text_model"),
        Family(
            model_type="gemma3",
            media={"image": _IMAGE},
            towers=_TOWER,
            masks=_masks("Gemma3ForConditionalGeneration"),
        ),
        Family(
            model_type="paligemma",
            media={"image": _IMAGE},
            towers=_TOWER,
            masks=_masks("PaliGemmaForConditionalGeneration"),
            first_position=1,
        ),
        Family(model_type="mistral3", media={"image": _IMAGE}),
        # Frames of a clip stand at placeholders of pictures.
        Family(model_type="glm4v", media={"image": _IMAGE, "video": replace(_VIDEO, token="image_token_id")}),
        Family(model_type="kimi_k25", media={"image": _IMAGE}),
        Family(model_type="qwen2_audio", media={"audio": _AUDIO}),
        Family(model_type="voxtral", media={"audio": _AUDIO}),
        Family(model_type="granite_speech", media={"audio": _AUDIO}),
        Family(model_type="audioflamingo3", media={"audio": _AUDIO}),
    )
}
"""The families that are tested, by `model_type`."""


def register_family(family: Family) -> None:
    """Makes `attach` know one more family, or another adapter for one, in this process."""
    FAMILIES[family.model_type] = family


def find_model(model: nn.Module) -> tuple[Any, Family]:
    """The part of the model that holds both the encoder and the language model, and its family.

    Raises:
        ValueError: No part is of a known family.
    """
    for module in model.modules():
        family = FAMILIES.get(str(getattr(getattr(module, "config", None), "model_type", None)))
        if family is not None and family.language in module._modules:
            return module, family
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise ValueError(
        f"cannot attach a reducer to {name}; supported families: {', '.join(FAMILIES)}; "
        "tokenthrift.attachment.register_family adds one"
    )
