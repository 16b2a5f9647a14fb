"""The JSON files by which transformers finds a processor for a model: standard classes of transformers, none of ours.

A recording goes in as it is (mono, 16 kHz), since the models compute their own spectra: Wav2Vec2's feature extractor
without normalization is just that. An image goes in at the model's size in [0, 1].
"""

from __future__ import annotations

from typing import Any

__all__ = ["image_files", "speech_files"]


def speech_files(sample_rate: int, pad_token: str | None = None) -> dict[str, dict[str, Any]]:
    """For models that read waveforms and have a `tokenizer.json`.

    Args:
        sample_rate: samples a second.
        pad_token: what fills up rows of token ids.
    """
    processor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "processor_class": "Wav2Vec2Processor"}
    audio = {"feature_size": 1, "sampling_rate": sample_rate, "padding_value": 0.0, "padding_side": "right"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {
        "preprocessor_config.json": {**processor, **audio, "do_normalize": False, "return_attention_mask": True},
        "tokenizer_config.json": {**tokenizer, **({"pad_token": pad_token} if pad_token else {})},
    }


def image_files(height: int, width: int) -> dict[str, dict[str, Any]]:
    """For models that read square images in [0, 1].

    Args:
        height: pixels.
        width: pixels.
    """
    size = {"height": height, "width": width}
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": False, "rescale_factor": 1 / 255, "resample": 3}
    return {"preprocessor_config.json": {"image_processor_type": "ViTImageProcessor", "size": size, **steps}}
