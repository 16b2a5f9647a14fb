"""Speech models of transformers behind the protocol of `tokenthrift.transcript`, one adapter a kind.

`ctc` reads wav2vec 2.0, HuBERT, WavLM, Parakeet CTC and their like, `transducer` Parakeet TDT and RNN-T, `whisper`
Whisper, `seq2seq` Moonshine and other encoder-decoders, `audio_lm` language models that take audio in their prompt
(Granite Speech, Qwen). `loading` chooses among them by the `model_type` of a folder; `base` holds what they share.
"""

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AudioLmRecognizer": "audio_lm",
        "CtcRecognizer": "ctc",
        "Seq2SeqRecognizer": "seq2seq",
        "TransducerRecognizer": "transducer",
        "WhisperRecognizer": "whisper",
        "load_transformers": "loading",
    },
)
