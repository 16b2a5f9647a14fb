"""Llama-MTSK as a model: the contract of all models, and a test for each mistake of the published code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_mtsk import BOS, EOS, characters, lips, speech, tiny_config, tiny_model
from tests.model_contract import ModelContract, Outputs
from tokenthrift.budget import ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.mtsk.config import AudioConfig, Compression, LanguageModelConfig, MtskConfig, Strategy, VideoConfig
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.network import projectors
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import IGNORED, Encoded
from tokenthrift.mtsk.training.scales import backward_by_scale
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.whisper import log_mel

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
VIDEO = VideoConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    channels=(4, 4, 8, 8),
    crop=32,
    trained=True,
)
SECONDS = (0.7, 1.3, 0.1)
TEXTS = ("hello there", "a cat", "x")
Item = tuple[Tensor, Tensor, str]


class TestContract(ModelContract):
    """All tasks, one adapter per scale and one for all, and a visual encoder that is trained."""

    def build(self) -> LlamaMtsk:
        return tiny_model("MSS", tasks=("avsr", "asr", "vsr"), video=VIDEO, audio_rates=(4,), video_rates=(2,))

    def items(self) -> list[Item]:
        return [(speech(s, i), lips(s, i), text) for i, (s, text) in enumerate(zip(SECONDS, TEXTS, strict=True))]

    def outputs(self, model: LlamaMtsk, items: list[Item]) -> Outputs:
        encoded = model.encode([a for a, _, _ in items], [v for _, v, _ in items])
        texts = [model.token_ids(text) for _, _, text in items]
        found: Outputs = [[] for _ in items]
        for rates in model.config.scales:
            logits = model.logits(model.rows(encoded, texts, rates), rates)
            for row, part in zip(found, logits.split([len(text) + 1 for text in texts]), strict=True):
                row.append(part)
        return found

    def shapes(self, model: LlamaMtsk, item: Item) -> list[tuple[int, ...]]:
        return [(len(item[2]) + 1, 34)] * len(model.config.scales)

    def loss(self, model: LlamaMtsk, items: list[Item]) -> Tensor:
        encoded = model.encode([a for a, _, _ in items], [v for _, v, _ in items])
        texts = [model.token_ids(text) for _, _, text in items]
        return torch.stack([model.loss(encoded, texts, rates) for rates in model.config.scales]).mean()


def batch(model: LlamaMtsk) -> tuple[Encoded, list[list[int]]]:
    encoded = model.encode([speech(s, i) for i, s in enumerate(SECONDS)], [lips(s, i) for i, s in enumerate(SECONDS)])
    return encoded, [model.token_ids(text) for text in TEXTS]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 20), st.sampled_from(get_args(Compression)))
@settings(deadline=None, max_examples=40)
def test_tokens_are_windows_of_an_items_own_states(lengths: list[int], rate: int, kind: Compression) -> None:
    states = torch.randn(len(lengths), max(lengths) + 3, 2, generator=torch.Generator().manual_seed(0))
    for row, n in enumerate(lengths):
        states[row, n:] = float("nan")
    tokens, counts = pool_by_rate(states, torch.tensor(lengths), rate, kind)
    for row, n in enumerate(lengths):
        windows = states[row, :n].split(rate)
        assert counts[row] == len(windows), "the last states make a token, also where they are fewer than the rate"
        for token, window in zip(tokens[row], windows, strict=False):
            if kind == "average":
                torch.testing.assert_close(token, window.mean(0))
            else:
                assert torch.equal(token[: 2 * len(window)], window.flatten())
        assert not tokens[row, len(windows) :].any()
    _, whole = pool_by_rate(states, torch.tensor(lengths), rate, kind, whole_windows=True)
    assert whole.tolist() == [n // rate for n in lengths]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_start_at_zero(strategy: Strategy, tmp_path: Path) -> None:
    fresh = LlamaMtsk(tiny_config(strategy), characters()).eval()
    fresh.save_pretrained(tmp_path / "model")
    for model in (fresh, LlamaMtsk.from_pretrained(tmp_path / "model")):
        embeddings = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
        lm: Any = model.language_model
        with torch.no_grad():
            plain = lm(inputs_embeds=embeddings).logits
            for rates in model.config.scales:
                with model.adapted(rates):
                    assert torch.equal(lm(inputs_embeds=embeddings).logits, plain)


def test_strategies_share_what_they_say() -> None:
    before = {}
    for strategy in STRATEGIES:
        model = tiny_model(strategy)
        encoded, texts = batch(model)
        rates = model.config.scales
        for k in range(4):
            model.zero_grad()
            model.loss(encoded, texts, rates[k]).backward()
            reached = {n.split(".")[4] for n, p in model.lora.named_parameters(prefix="lora") if p.grad is not None}
            assert reached == {"MS": {"0"}, "SS": {str(k)}, "MSS": {str(k), "4"}}[strategy]
        before[strategy] = model.loss(encoded, texts, rates[0]).item()
    assert len(set(before.values())) == 3


def test_frozen_encoders_stay_in_evaluation_mode() -> None:
    model = tiny_model().train()
    first = copy.deepcopy(model.state_dict())
    states = [model.encode([speech(0.5, 1)], [lips(0.5, 1)]) for _ in range(2)]
    assert states[0].video is not None
    assert states[1].video is not None
    assert torch.equal(states[0].video, states[1].video)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert not any(m.training for m in model.video_encoder.modules()) if model.video_encoder else False
    assert tiny_model(video=VIDEO).train().video_encoder.training  # type: ignore[union-attr]


def test_silence_is_read_after_a_recording_and_makes_no_tokens() -> None:
    plain = tiny_model(tasks=("asr",), video=None, video_rates=())
    sounds = [speech(s, i) for i, s in enumerate((*SECONDS, 29.9))]
    without = plain.encode(sounds)
    assert plain.config.audio is not None
    model = LlamaMtsk(replace(plain.config, audio=replace(plain.config.audio, trailing_silence=0.3)), characters())
    model.load_state_dict(plain.state_dict())
    found = model.eval().encode(sounds)
    assert found.audio is not None
    assert without.audio is not None
    assert without.audio_lengths is not None
    assert found.audio_lengths is not None
    lengths = found.audio_lengths.tolist()
    assert lengths == without.audio_lengths.tolist()
    for row, (sound, n) in enumerate(zip(sounds, lengths, strict=True)):
        (alone,), _ = plain.encode_audio([torch.cat([sound, torch.zeros(4800)])[:480_000]])
        torch.testing.assert_close(found.audio[row, :n], alone[:n], rtol=0, atol=1e-5)
        assert not found.audio[row, n:].any()
    assert (found.audio - without.audio).abs().max() > 1e-3
    sizes = [ItemSize(seconds=len(sound) / 16_000) for sound in sounds]
    assert model.plan(sizes) == plain.plan(sizes)


def test_nothing_reads_what_stands_after_the_end_of_an_item() -> None:
    model = tiny_model()
    encoded, texts = batch(model)
    rates = Rates(4, 2)
    expected = model.loss(encoded, texts, rates)
    assert encoded.audio is not None
    assert encoded.video is not None
    for states, lengths in ((encoded.audio, encoded.audio_lengths), (encoded.video, encoded.video_lengths)):
        assert lengths is not None
        for row, n in zip(states, lengths.tolist(), strict=True):
            row[n:] = float("nan")
    assert torch.equal(model.loss(encoded, texts, rates), expected)


def test_a_trained_batch_norm_sees_no_padding() -> None:
    model = tiny_model(video=VIDEO)
    means = []
    for videos in ([lips(0.4, 1), lips(0.2, 2)], [lips(0.4, 1), lips(0.2, 2), lips(0.4, 1), lips(0.2, 2)]):
        fresh = copy.deepcopy(model).train()
        assert fresh.video_encoder is not None
        fresh.encode_video(videos)
        means.append(fresh.video_encoder.feature_extractor_video.resnet.frontend3D[1].running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-6)


def test_markers_are_trained_and_say_where_blocks_are() -> None:
    model = tiny_model()
    encoded, texts = batch(model)
    model.loss(encoded, texts, Rates(4, 2)).backward()
    assert model.markers is not None
    assert model.markers.grad is not None
    assert bool(model.markers.grad.any(1).all())
    heads, tails = model.blocks(encoded, Rates(16, 5))
    assert torch.equal(heads[2][[1, -1]], model.markers[:2])
    assert torch.equal(tails[2][0], model.markers[2])


def test_the_loss_sees_the_text_and_its_end_alone() -> None:
    model = tiny_model()
    encoded, texts = batch(model)
    rows = model.rows(encoded, texts, Rates(16, 5))
    for row, text in zip(rows.labels, texts, strict=True):
        assert row[row != IGNORED].tolist() == [BOS, *text, EOS]
    assert rows.labels[~rows.mask].unique().tolist() == [IGNORED]


def test_a_qwen_without_start_or_padding_tokens() -> None:
    language_model = LanguageModelConfig(
        model_type="qwen2",
        vocab_size=34,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    model = tiny_model(language_model=language_model, bos_id=None)
    encoded, texts = batch(model)
    rows = model.rows(encoded, texts, Rates(16, 5))
    assert model.markers is not None
    assert torch.equal(rows.embeddings[0, 0], model.markers[0]), "audio comes first"
    assert [(row != IGNORED).sum().item() for row in rows.labels] == [len(text) + 1 for text in texts]
    assert len(model.transcribe([speech(0.5, 1)], [lips(0.5, 1)])) == 1


@pytest.mark.parametrize("kind", get_args(Compression))
def test_projectors_end_in_a_norm_at_every_rate(kind: Compression) -> None:
    for rate, layer in zip((2, 4), projectors((2, 4), 8, 16, 32, kind), strict=True):
        out = layer(torch.randn(5, 8 * (rate if kind == "stack" else 1)))
        torch.testing.assert_close(out.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    model = tiny_model(compression=kind)
    encoded, texts = batch(model)
    assert all(model.loss(encoded, texts, rates).isfinite() for rates in model.config.scales)


@pytest.mark.parametrize("kind", get_args(Compression))
def test_tokens_of_every_rate_have_one_level(kind: Compression) -> None:
    model = tiny_model(compression=kind)
    encoded, _ = batch(model)
    for modality, rate in (("audio", 4), ("audio", 16), ("video", 2), ("video", 5)):
        tokens, counts = model.tokens(encoded, modality, rate)
        for row, n in zip(tokens, counts.tolist(), strict=True):
            torch.testing.assert_close(row[:n].mean(1), torch.zeros(n), rtol=0, atol=1e-5)
            torch.testing.assert_close(row[:n].std(1, correction=0), torch.ones(n), rtol=0, atol=1e-2)
    bare = tiny_model(compression=kind, projector_norm=False)
    levels = bare.tokens(bare.encode([speech(0.7, 1)], [lips(0.7, 1)]), "audio", 16)[0].std(2)
    assert (levels - 1).abs().min() > 0.05, "without a norm a token has the level of its states"


def test_whisper_reads_a_recording_at_its_own_level() -> None:
    model, released = tiny_model(), tiny_model(compat="released", bos_id=BOS)
    sound = speech(0.7, 1)
    assert model.audio_encoder is not None
    (states,), (count,) = model.encode_audio([sound])
    mel = log_mel(sound)[None]
    torch.testing.assert_close(states[None], model.audio_encoder(mel, torch.tensor([mel.shape[2] // 2])))
    assert count == mel.shape[2] // 2
    quiet = model.encode_audio([0.01 * sound])[0][0]
    assert (states - quiet).abs().max() > 0.1, "whispering is not speaking"
    both = [released.encode_audio([gain * sound])[0][0] for gain in (1.0, 0.5)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-2, msg="published: each waveform is layer-normed")


class _Saved:
    """A tensor kept for backward; counts what is kept at the moment and the most there was."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        _Saved.now += self.size
        _Saved.most = max(_Saved.most, _Saved.now)

    def __del__(self) -> None:
        _Saved.now -= self.size


def _peak(run: Any) -> int:
    _Saved.now = _Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
        run()
    return _Saved.most


def _loss(model: LlamaMtsk, texts: list[list[int]], encoded: Encoded, rates: Rates) -> Tensor:
    return model.loss(encoded, texts, rates)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("trained", [False, True])
def test_scale_by_scale_has_the_gradient_of_all_at_once(strategy: Strategy, trained: bool) -> None:
    models = [tiny_model(strategy, **({"video": VIDEO} if trained else {})) for _ in range(2)]
    gradients, losses = [], []
    for model, together in zip(models, (True, False), strict=True):
        encoded, texts = batch(model)
        scales = model.config.scales
        if together:
            each = [model.loss(encoded, texts, rates) for rates in scales]
            torch.stack(each).mean().backward()
        else:
            each = list(backward_by_scale(partial(_loss, model, texts), encoded, scales).values())
        losses.append(torch.stack(each).detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    assert gradients[0].keys() == gradients[1].keys()
    assert any(n.startswith("video_encoder") for n in gradients[0]) == trained
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_scale_by_scale_needs_the_memory_of_one() -> None:
    model = tiny_model()
    encoded, texts = batch(model)
    loss = partial(_loss, model, texts)

    def one_by_one(scales: Sequence[Rates]) -> int:
        return _peak(lambda: backward_by_scale(loss, encoded, scales))

    finest, everything = one_by_one([Rates(4, 2)]), one_by_one(model.config.scales)
    at_once = _peak(lambda: torch.stack([loss(encoded, rates) for rates in model.config.scales]).mean().backward())
    assert everything <= 1.15 * finest
    assert at_once > 3 * finest


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"audio": None}, "audio"),
        ({"tasks": ("asr",)}, "video"),
        ({"tasks": ()}, "tasks"),
        ({"audio_rates": (16, 4)}, "ascending"),
        ({"video_rates": (0,)}, "video_rates"),
        ({"eos_id": 34}, "eos_id"),
        ({"projector_hidden_size": 0}, "projector_hidden_size"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_config(**changes)


def test_streams_that_a_model_cannot_read_are_refused() -> None:
    audio_only = tiny_model(tasks=("asr",), video=None, video_rates=())
    with pytest.raises(ValueError, match="takes no video"):
        audio_only.encode(None, [lips(0.2, 1)])
    video_only = tiny_model(tasks=("vsr",), audio=None, audio_rates=())
    with pytest.raises(ValueError, match="takes no audio"):
        video_only.encode([speech(0.2, 1)])
    with pytest.raises(ValueError, match="no rates"):
        audio_only.loss(audio_only.encode([speech(0.2, 1)]), [[1]], Rates(4, 2))
    with pytest.raises(ValueError, match="multiple of 16"):
        VideoConfig(hidden_size=24, num_attention_heads=2)
    assert isinstance(MtskConfig(eos_id=1).audio, AudioConfig)


def test_streams_that_do_not_belong_together_are_refused() -> None:
    states, lengths = torch.zeros(2, 3, 4), torch.tensor([3, 2])
    for given_states, problem in (
        ({"audio": states}, "audio states and audio_lengths go together"),
        ({"video_lengths": lengths}, "video states and video_lengths go together"),
        ({}, "neither audio nor video"),
        (
            {"audio": states, "audio_lengths": lengths, "video": states[:1], "video_lengths": lengths[:1]},
            "2 items with audio but 1 with video",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            Encoded(**given_states)
    chosen = Encoded(video=states, video_lengths=lengths).select([1])
    assert len(chosen) == 1
    assert chosen.video_lengths is not None
    assert chosen.video_lengths.tolist() == [2]


def test_gradients_go_back_through_both_encoders() -> None:
    sources = {name: torch.ones(1, 2, 3, requires_grad=True) for name in ("audio", "video")}
    lengths = torch.tensor([2])
    encoded = Encoded(
        audio=sources["audio"] * 2, audio_lengths=lengths, video=sources["video"] * 3, video_lengths=lengths
    )

    def loss(states: Encoded, scale: int) -> Tensor:
        assert states.audio is not None
        assert states.video is not None
        return scale * (states.audio.sum() + states.video.sum())

    losses = backward_by_scale(loss, encoded, [1, 3])
    assert [value.item() for value in losses.values()] == [30.0, 90.0]
    for name, factor in (("audio", 2), ("video", 3)):
        gradient = sources[name].grad
        assert gradient is not None
        assert torch.equal(gradient, torch.full((1, 2, 3), factor * 2.0))
