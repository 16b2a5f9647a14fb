"""Transcribe in one round, find what is not sure, and spend more rounds on those recordings alone.

python examples/transcribe_and_refine.py samples/speech/librivox-*.flac
"""

import sys

from tokenthrift.budget import DecodeBudget, ItemSize
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.media.audio import read_audio

SURE = 0.8  # mean confidence of a text that needs no second look

paths = sys.argv[1:]
model = DllmAsr.from_pretrained("model_cards/dllm-asr-tiny-en")
audio = [read_audio(path) for path in paths]  # mono, 16 kHz, at most 30 s each
sizes = [ItemSize(seconds=len(samples) / 16_000) for samples in audio]
print([usage.used for usage in model.plan(sizes)], "tokens, known before")

results = model.transcribe(audio, decode=DecodeBudget(max_rounds=1))
confidence = [sum(token.confidence for token in r.tokens) / max(len(r.tokens), 1) for r in results]
unsure = [i for i, mean in enumerate(confidence) if mean < SURE]
for i, better in zip(unsure, model.transcribe([audio[i] for i in unsure]), strict=True):
    print(f"{paths[i]} ({confidence[i]:.2f})\n  1 round   {results[i].text}")
    print(f"  {better.usage.rounds} rounds  {better.text}")
    results[i] = better
print(f"{len(unsure)} of {len(paths)} refined; {sum(r.usage.rounds or 0 for r in results)} rounds in all")
