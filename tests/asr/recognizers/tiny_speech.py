"""Tiny random checkpoints of transformers' speech models, saved as their published folders are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.asr.tiny_dllm import write_bpe, write_whisper

_LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _louder(model: Any, name: str | None = None, seed: int = 0) -> Any:
    """Weights so large that the text depends on the audio."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = (9.0 if name and name in key else 1.0) * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def letters_tokenizer(folder: Path) -> Any:
    """Characters, as those of wav2vec 2.0."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *_LETTERS]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def bpe_tokenizer(folder: Path, *special: str, kind: Any = transformers.PreTrainedTokenizerFast, **options: Any) -> Any:
    """A byte-level BPE with further special tokens, the last ids."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bpe(folder / "tokenizer.json")
    end = "<|endoftext|>"
    tokenizer = kind(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=end, bos_token=end, **{"pad_token": end} | options
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def wav2vec2(folder: Path, kind: str = "Wav2Vec2", norm: str = "group") -> Path:
    """wav2vec 2.0 or HuBERT; `norm` is "group" in the base models, which padding changes, and "layer" in the large."""
    tokenizer = letters_tokenizer(folder)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        **_SIZES,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 8, 8),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        pad_token_id=0,
    )
    _louder(getattr(transformers, f"{kind}ForCTC")(config), "lm_head").save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hubert(folder: Path) -> Path:
    """HuBERT."""
    return wav2vec2(folder, "Hubert")


def wav2vec2_bert(folder: Path) -> Path:
    """Wav2Vec2-BERT, which reads a spectrogram."""
    tokenizer = letters_tokenizer(folder)
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=len(tokenizer),
        **_SIZES,
        pad_token_id=0,
        conv_depthwise_kernel_size=5,
        feature_projection_input_dim=32,
    )
    _louder(transformers.Wav2Vec2BertForCTC(config), "lm_head").save_pretrained(folder)
    transformers.SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _conformer() -> dict[str, Any]:
    return {
        **_SIZES,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "num_mel_bins": 16,
        "subsampling_factor": 4,
    }


def parakeet_ctc(folder: Path) -> Path:
    """Parakeet with a CTC head."""
    tokenizer = bpe_tokenizer(folder, "<pad>", kind=transformers.ParakeetTokenizer, pad_token="<pad>")
    config = transformers.ParakeetCTCConfig(
        vocab_size=len(tokenizer), encoder_config=_conformer(), pad_token_id=tokenizer.pad_token_id
    )
    _louder(transformers.ParakeetForCTC(config), "ctc_head").save_pretrained(folder)
    transformers.ParakeetFeatureExtractor(feature_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def parakeet_tdt(folder: Path) -> Path:
    """Parakeet with a token-and-duration transducer."""
    tokenizer = bpe_tokenizer(folder, "<pad>", "<blank>", kind=transformers.ParakeetTokenizer, pad_token="<pad>")
    config = transformers.ParakeetTDTConfig(
        vocab_size=len(tokenizer),
        encoder_config=_conformer(),
        decoder_hidden_size=16,
        num_decoder_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=len(tokenizer) - 1,
    )
    _louder(transformers.ParakeetForTDT(config), "joint").save_pretrained(folder)
    transformers.ParakeetFeatureExtractor(feature_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moonshine(folder: Path) -> Path:
    """Moonshine."""
    tokenizer = bpe_tokenizer(folder)
    config = transformers.MoonshineConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        **{f"{side}_num_hidden_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_num_attention_heads": 4 for side in ("encoder", "decoder")},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
    )
    _louder(transformers.MoonshineForConditionalGeneration(config), seed=3).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    **{
        f"{side}_{name}": 4 if "heads" in name else 2
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads")
    },
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _written_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return dict.fromkeys(names, tokenizer.eos_token_id)


def speecht5(folder: Path) -> Path:
    """SpeechT5 from speech to text."""
    tokenizer = bpe_tokenizer(folder)
    config = transformers.SpeechT5Config(
        vocab_size=len(tokenizer),
        **_DECODER,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 8, 8),
        **_written_ids(tokenizer),
    )
    _louder(transformers.SpeechT5ForSpeechToText(config), seed=3).save_pretrained(folder)
    transformers.SpeechT5FeatureExtractor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def seamless_m4t(folder: Path) -> Path:
    """SeamlessM4T from speech to text in English or German."""
    tokenizer = bpe_tokenizer(folder)
    config = transformers.SeamlessM4TConfig(
        vocab_size=len(tokenizer),
        **_DECODER,
        speech_encoder_layers=2,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=64,
        feature_projection_input_dim=32,
        conv_depthwise_kernel_size=5,
        **_written_ids(tokenizer),
    )
    model = _louder(transformers.SeamlessM4TForSpeechToText(config), seed=4)
    model.generation_config = transformers.GenerationConfig(
        **_written_ids(tokenizer), text_decoder_lang_to_code_id={"eng": 5, "deu": 60}
    )
    model.save_pretrained(folder)
    transformers.SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def granite_speech(folder: Path) -> Path:
    """Granite Speech: a conformer, a Q-Former and a language model."""
    tokenizer = bpe_tokenizer(folder, "<|audio|>")
    config = transformers.GraniteSpeechConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **_SIZES,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
        },
        encoder_config={
            "model_type": "granite_speech_encoder",
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 4,
            "dim_head": 8,
            "output_dim": 8,
            "context_size": 20,
            "max_pos_emb": 32,
        },
        projector_config={"model_type": "blip_2_qformer", "encoder_hidden_size": 32, **_SIZES},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    _louder(transformers.GraniteSpeechForConditionalGeneration(config), "lm_head").save_pretrained(folder)
    transformers.GraniteSpeechProcessor(transformers.GraniteSpeechFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


def qwen2_audio(folder: Path) -> Path:
    """Qwen2-Audio: Whisper's encoder and a language model."""
    tokenizer = bpe_tokenizer(folder, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>")
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **_SIZES, "num_key_value_heads": 4},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    _louder(transformers.Qwen2AudioForConditionalGeneration(config), "lm_head").save_pretrained(folder)
    transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(
        folder
    )
    return folder


def whisper(folder: Path) -> Path:
    """Whisper, English only as tiny.en."""
    write_whisper(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def multilingual_whisper(folder: Path) -> Path:
    """Whisper of three languages; it is the size of its vocabulary that makes one multilingual."""
    special = ("<|en|>", "<|de|>", "<|fr|>", "<|transcribe|>", "<|translate|>", "<|nospeech|>")
    write_whisper(folder, special, 51_866)
    model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    _louder(model).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "wav2vec2": wav2vec2,
    "wav2vec2-layer": lambda folder: wav2vec2(folder, norm="layer"),
    "hubert": hubert,
    "wav2vec2_bert": wav2vec2_bert,
    "parakeet_ctc": parakeet_ctc,
    "parakeet_tdt": parakeet_tdt,
    "moonshine": moonshine,
    "speecht5": speecht5,
    "granite_speech": granite_speech,
    "qwen2_audio": qwen2_audio,
    "whisper": whisper,
}
"""By name, what makes a folder of it."""
