"""Samplers of masked-diffusion language models: one loop, one object for each algorithm.

    from tokenthrift.backbones.samplers import Canvas, LladaSampler, TokenIds, sample

    canvas = Canvas.after_prompt(prompt, 64, mask_id)                # prompt (B, P) of token ids
    done = sample(model, canvas, LladaSampler(steps=32), TokenIds(mask_id, eos_id))
    done.responses()                                                 # token ids of each response

`model(ids, mask, rows)` gives logits; another algorithm is another object in the same line.

| object | algorithm |
| --- | --- |
| `LladaSampler` | quotas over fixed steps, semi-autoregressive blocks, guidance, noise, EOS options |
| `FastDllmSampler` | threshold, factor, quota or one at a time, in blocks, with prefix or dual cache |
| `DreamSampler` | a time schedule; probability, margin, entropy or chance |
| `EntropyBoundSampler` | what is nearly independent, together |
| `PriorGuidedSampler` | dLLM-ASR: from a draft, with verification and pruning |
| `DaedalSampler` | a response that grows; insertion into drafts that are too short |
| `speculate` | DiffuSpec: drafts for a causal model, which verifies them |

rules    which slots to commit: pure functions of confidences
scores   candidates and confidences of slots
loop     `sample`, and what passes between loop, model and sampler; `Trace` records every call
blocks   what the samplers that work block by block share
"""

from tokenthrift.backbones.samplers.daedal import DaedalSampler
from tokenthrift.backbones.samplers.diffuspec import AdaptiveLength, DiffuSpec, speculate
from tokenthrift.backbones.samplers.dream import DreamSampler
from tokenthrift.backbones.samplers.entropy_bound import EntropyBoundSampler
from tokenthrift.backbones.samplers.fast_dllm import FastDllmSampler
from tokenthrift.backbones.samplers.llada import LladaSampler
from tokenthrift.backbones.samplers.loop import (
    CachedPredict,
    Canvas,
    Predict,
    Sampled,
    Sampler,
    TokenIds,
    Trace,
    sample,
)
from tokenthrift.backbones.samplers.one_path import OnePathSampler
from tokenthrift.backbones.samplers.prior_guided import PriorGuidedSampler
from tokenthrift.backbones.samplers.ragged import sample_ragged

SAMPLERS: dict[str, type[Sampler]] = {
    "llada": LladaSampler,
    "fast_dllm": FastDllmSampler,
    "dream": DreamSampler,
    "entropy_bound": EntropyBoundSampler,
    "prior_guided": PriorGuidedSampler,
    "daedal": DaedalSampler,
    "diffuspec": OnePathSampler,
}
"""Samplers by the names that configurations call them by."""

__all__ = [
    "SAMPLERS",
    "AdaptiveLength",
    "CachedPredict",
    "Canvas",
    "DaedalSampler",
    "DiffuSpec",
    "DreamSampler",
    "EntropyBoundSampler",
    "FastDllmSampler",
    "LladaSampler",
    "OnePathSampler",
    "Predict",
    "PriorGuidedSampler",
    "Sampled",
    "Sampler",
    "TokenIds",
    "Trace",
    "sample",
    "sample_ragged",
    "speculate",
]
