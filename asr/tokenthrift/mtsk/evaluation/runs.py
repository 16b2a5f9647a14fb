"""Every model at each of its scales in each condition of a set.

Source: the noise and rate tables of Llama-MTSK (arXiv 2503.06362). What differs: the encoders run once for all models
and rates, and every model gets the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenthrift.budget import TokenUsage
from tokenthrift.evaluation.wer import character_errors, word_errors
from tokenthrift.mtsk.evaluation.conditions import conditions, degraded, noisy, unpunctuated
from tokenthrift.mtsk.evaluation.tables import EvaluationRow
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.clips import UNREADABLE, Clip, ManifestClips
from tokenthrift.mtsk.transcribing import Recording, token_limit, transcript_of

__all__ = ["evaluate", "readable"]


def readable(data: ManifestClips, limit: int | None = None) -> tuple[list[Clip], list[str]]:
    """The clips of a manifest that can be read, and for each of the others what is wrong with it.

    Args:
        data: the manifest.
        limit: most lines to look at.
    """
    clips, wrong = [], []
    for i in range(min(len(data), limit or len(data))):
        try:
            clips.append(data[i])
        except UNREADABLE as error:
            wrong.append(str(error))
    return clips, wrong


def batches(clips: Sequence[Clip], size: int = 16) -> Iterator[list[int]]:
    """Indices of clips of like length."""
    order = sorted(range(len(clips)), key=lambda i: _recording(clips[i]).seconds)
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def evaluate(
    models: Sequence[tuple[str, LlamaMtsk]],
    clips: Sequence[Clip],
    babble: Tensor | None,
    snrs: Sequence[float | None],
    *,
    beams: int | None = None,
    seed: int = 0,
    normalize: Callable[[str], str] = unpunctuated,
) -> list[EvaluationRow]:
    """Every model at each of its scales in each condition.

    Args:
        models: name and model; all with the same frozen encoders, which run once for all of them.
        clips: one set, either all or none with audio, and with video.
        babble: noise for the levels that are not None.
        snrs: levels in dB; None for clean.
        beams: width of the search; that of each model if not given.
        seed: of the noise.
        normalize: what is done to both texts before they are compared.

    Raises:
        ValueError: there is no clip, the encoders or how recordings are filled up for them differ, only some clips have
            a stream, a level is given without noise, or no two clips differ in what is said, so that their lips cannot
            be shuffled.
    """
    if not clips:
        raise ValueError("there is no clip to be evaluated on")
    first = models[0][1]
    for name, model in models[1:]:
        if not _same_encoders(first, model):
            raise ValueError(f"{name} has other encoders than {models[0][0]} or other silence; evaluate it alone")
    streams = (_has(clips, "audio"), _has(clips, "video"))
    if not streams[0]:
        snrs = [None]
    if babble is None and any(snr is not None for snr in snrs):
        raise ValueError("there are levels of noise, but no noise")
    passes = conditions(snrs, controls=all(streams))
    versions = {control: degraded(clips, control) for _, control in passes}
    out = []
    lips: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # noise does not change what is seen
    sizes = [_recording(clip).size for clip in clips]
    usages: dict[tuple[int, Rates], tuple[TokenUsage, ...]] = {}  # nor does it change lengths
    for snr, control in passes:
        here = versions[control] if babble is None else noisy(versions[control], babble, snr, seed)
        found: dict[tuple[int, Rates], dict[int, str]] = {}
        for number, rows in enumerate(batches(here)):
            states: dict[str, Tensor] = {}
            if streams[0] and first.audio_encoder is not None:
                audio = [clip.audio for i in rows if (clip := here[i]).audio is not None]
                states["audio"], states["audio_lengths"] = first.encode_audio(audio)
            if streams[1] and first.video_encoder is not None:
                key = (control if "video" in control else "", number)
                if key not in lips:
                    lips[key] = first.encode_video([clip.video for i in rows if (clip := here[i]).video is not None])
                states["video"], states["video_lengths"] = lips[key]
            encoded = Encoded(**states)
            seconds = [_recording(here[i]).seconds for i in rows]
            for k, (_, model) in enumerate(models):
                scales = _possible_scales(model, streams, control)
                limits = [token_limit(model.config, length) for length in seconds]
                for rates, rows_of in model.generate_all(encoded, scales, limits, beams=beams).items():
                    texts = found.setdefault((k, rates), {})
                    if (k, rates) not in usages:
                        usages[k, rates] = model.plan(sizes, rates=rates)
                    for i, length, generation in zip(rows, seconds, rows_of, strict=True):
                        texts[i] = transcript_of(model, generation, length, usages[k, rates][i]).text
        truth = [clip.text for clip in clips]
        for (k, rates), texts in found.items():
            said = [texts[i] for i in range(len(clips))]
            errors = word_errors(truth, said, normalize), character_errors(truth, said, normalize)
            tokens = sum(usage.used for usage in usages[k, rates]) / len(clips)
            out.append(EvaluationRow(models[k][0], rates, snr, control, *errors, tokens))
    return out


def _has(clips: Sequence[Clip], stream: str) -> bool:
    """Whether the clips of a set have a stream."""
    count = sum(getattr(clip, stream) is not None for clip in clips)
    if 0 < count < len(clips):
        raise ValueError(f"{count} of {len(clips)} clips have {stream}; make a set of those that have it, and one more")
    return count > 0


def _possible_scales(model: LlamaMtsk, streams: tuple[bool, bool], control: str) -> list[Rates]:
    """The scales that a set has the streams for; with a control only those that take both."""
    fitting = [r for r in model.config.scales if (streams[0] or not r.audio) and (streams[1] or not r.video)]
    return [r for r in fitting if not control or (r.audio and r.video)]


def _recording(clip: Clip) -> Recording:
    return Recording(clip.audio, clip.video)


def _same_encoders(one: LlamaMtsk, other: LlamaMtsk) -> bool:
    # States also depend on how a recording is filled up.
    first, second = ((m.config.released, m.config.audio and m.config.audio.trailing_silence) for m in (one, other))
    if first != second:
        return False
    for name in ("audio_encoder", "video_encoder"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if (ours is None) != (theirs is None):
            return False
        if ours is not None:
            a, b = ours.state_dict(), theirs.state_dict()
            if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
                return False
    return True
