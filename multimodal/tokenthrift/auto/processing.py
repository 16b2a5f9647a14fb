"""The JSON files by which transformers finds a processor for a model: standard classes of transformers, none of ours.

A recording goes in as it is (mono, 16 kHz), since the models compute their own spectra: Wav2Vec2's feature extractor
without normalization is just that. An image goes in at the model's size in [0, 1].
"""

from __future__ import annotations

from typing import Any

__all__ = ["image_files", "speech_files", "tokenizer_files", "video_files"]


def speech_files(sample_rate: int, pad_token: str | None = None) -> dict[str, dict[str, Any]]:
    """For models that read waveforms and have a `tokenizer.json`.

    Args:
        sample_rate: samples a second.
        pad_token: what fills up rows of token ids.
    """
    processor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "processor_class": "Wav2Vec2Processor"}
    audio = {"feature_size": 1, "sampling_rate": sample_rate, "padding_value": 0.0, "padding_side": "right"}
    return {
        "preprocessor_config.json": {**processor, **audio, "do_normalize": False, "return_attention_mask": True},
        **tokenizer_files(pad_token),
    }


def tokenizer_files(pad_token: str | None = None) -> dict[str, dict[str, Any]]:
    """For models that have a `tokenizer.json`.

    Args:
        pad_token: what fills up rows of token ids.
    """
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer_config.json": {**tokenizer, **({"pad_token": pad_token} if pad_token else {})}}


def image_files(height: int, width: int) -> dict[str, dict[str, Any]]:
    """For models that read square images in [0, 1].

    Args:
        height: pixels.
        width: pixels.
    """
    size = {"height": height, "width": width}
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": False, "rescale_factor": 1 / 255, "resample": 3}
    return {"preprocessor_config.json": {"image_processor_type": "ViTImageProcessor", "size": size, **steps}}


def video_files(size: int, num_frames: int) -> dict[str, dict[str, Any]]:
    """For models that read a number of square frames in [0, 1], spread evenly over a clip.

    Args:
        size: pixels.
        num_frames: frames.
    """
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": False, "rescale_factor": 1 / 255, "resample": 3}
    frames = {"do_sample_frames": True, "num_frames": num_frames, "size": {"height": size, "width": size}}
    kind = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    return {"video_preprocessor_config.json": {**kind, **frames, **steps}}
