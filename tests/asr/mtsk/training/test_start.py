"""Starts of a training: one model of Llama-MTSK from the weights of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.asr.mtsk.training.mtsk_runs import TEXTS, fit, module_of, same, weights_of
from tests.asr.talking import write_parts, write_states
from tokenthrift.config import ConfigError
from tokenthrift.mtsk import Rates
from tokenthrift.mtsk.convert import mtsk
from tokenthrift.mtsk.training.start import Origin, carried_over

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("states") / "0.safetensors", TEXTS).parent


@pytest.mark.parametrize("strategy", ["MS", "SS", "MSS"])
def test_one_pair_of_rates_starts_many(parts: dict[str, str], states: Path, tmp_path: Path, strategy: str) -> None:
    one = module_of(parts, audio_rates=(2,), video_rates=(1,))
    fit(one, states, 3, tmp_path)
    many = module_of(parts, strategy=strategy, start_from=str(tmp_path / "step=3.ckpt"))
    assert same(weights_of(many, "language_model"), weights_of(one, "language_model"))
    for place in "01":
        ours = weights_of(many, f"audio_proj.{place}.")
        theirs = weights_of(one, "audio_proj.0.")
        assert [name.replace(f"proj.{place}", "proj.0") for name in ours] == list(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
    one.model.save_pretrained(tmp_path / "model")
    again = module_of(parts, strategy=strategy, start_from=str(tmp_path / "model"))
    assert same(weights_of(again, "language_model", "audio_proj"), weights_of(many, "language_model", "audio_proj"))


@pytest.mark.parametrize("strategy", ["SS", "MSS"])
def test_one_adapter_for_all_scales_starts_those_of_each(parts: dict[str, str], strategy: str) -> None:
    one = module_of(parts, audio_rates=(2,), video_rates=(1,)).model.eval()
    with torch.no_grad():
        for name, weight in one.lora.named_parameters():
            if "down" in name:
                weight.normal_()
    many = module_of(parts, strategy=strategy).model.eval()
    many.load_state_dict(carried_over(many, one.state_dict(), Origin.of(one.config)))
    clips = [torch.randn(8_000) * 0.1], [torch.zeros(12, 96, 96, dtype=torch.uint8)]
    encoded, ids = one.encode(*clips), [one.token_ids(TEXTS[0])]
    with torch.no_grad():
        expected = one.loss(encoded, ids, Rates(2, 1))
        torch.testing.assert_close(many.loss(encoded, ids, Rates(2, 1)), expected)
    used = {name.split(".")[3] for name, weight in many.lora.named_parameters() if "down" in name and weight.any()}
    assert used == ({"0", "1", "2", "3"} if strategy == "SS" else {"4"})


def test_adapters_of_scales_do_not_start_others(parts: dict[str, str]) -> None:
    for_scales = module_of(parts, strategy="SS").model
    with torch.no_grad():
        for weight in for_scales.lora.parameters():
            weight.fill_(1.0)
    for strategy in ("MS", "MSS"):
        other = module_of(parts, strategy=strategy).model
        filled = carried_over(other, for_scales.state_dict(), Origin.of(for_scales.config))
        assert all(torch.equal(filled[f"lora.{name}"], own) for name, own in other.lora.state_dict().items())
    # Of the four pairs of (2, 6) and (1, 3) this one has the two with 6.
    again = module_of(parts, strategy="SS", audio_rates=(6,)).model
    filled = carried_over(again, for_scales.state_dict(), Origin.of(for_scales.config))
    assert all(filled[f"lora.{name}"].eq(1).all() for name in again.lora.state_dict())
    coarser = module_of(parts, strategy="SS", audio_rates=(12,)).model
    filled = carried_over(coarser, for_scales.state_dict(), Origin.of(for_scales.config))
    assert all(torch.equal(filled[f"lora.{name}"], own) for name, own in coarser.lora.state_dict().items())


def test_a_projector_starts_as_that_of_the_nearest_rate(parts: dict[str, str], tmp_path: Path) -> None:
    many = module_of(parts).model
    many.save_pretrained(tmp_path / "model")
    one = module_of(parts, audio_rates=(5,), video_rates=(1,), start_from=str(tmp_path / "model")).model
    name = "0.weight"
    assert torch.equal(one.state_dict()[f"audio_proj.0.{name}"], many.state_dict()[f"audio_proj.1.{name}"])
    assert torch.equal(one.state_dict()[f"video_proj.0.{name}"], many.state_dict()[f"video_proj.0.{name}"])


def test_encoders_stay_those_of_the_configuration(parts: dict[str, str], tmp_path: Path) -> None:
    given = module_of(parts).model
    own = weights_of(module_of(parts), "audio_encoder", "video_encoder")
    with torch.no_grad():
        for name, weight in given.named_parameters():
            if name == "markers" or "_encoder." in name:
                weight.fill_(3.0)
    given.save_pretrained(tmp_path / "model")
    started = module_of(parts, start_from=str(tmp_path / "model"))
    assert started.model.state_dict()["markers"].eq(3.0).all()
    assert same(weights_of(started, "audio_encoder", "video_encoder"), own)


def test_what_does_not_fit_stays(parts: dict[str, str]) -> None:
    many = module_of(parts, strategy="SS").model
    given = {"markers": torch.zeros(4, 64), "lora.nothing": torch.zeros(1), "audio_proj.0.0.weight": torch.zeros(1, 1)}
    filled = carried_over(many, given, Origin.of(many.config))
    own = many.state_dict()
    assert filled.keys() == own.keys()
    assert not filled["markers"].any()
    assert torch.equal(filled["audio_proj.0.0.weight"], own["audio_proj.0.0.weight"])


def test_states_made_with_other_silence_are_refused(parts: dict[str, str], tmp_path: Path) -> None:
    shard = write_states(tmp_path / "states" / "0.safetensors", TEXTS, trailing_silence="0.5")
    with pytest.raises(ConfigError, match=r"trailing_silence 0\.5, the model has 0\.0"):
        fit(module_of(parts), shard.parent, 1)
    fit(module_of(parts, trailing_silence=0.5), shard.parent, 1)
    write_states(tmp_path / "states" / "1.safetensors", TEXTS, trailing_silence="0")
    with pytest.raises(ValueError, match=r"different trailing_silence: \[0\.0, 0\.5\]"):
        fit(module_of(parts), shard.parent, 1)


def test_a_start_that_is_gone_is_missed_unless_a_checkpoint_goes_on(
    parts: dict[str, str], states: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.ckpt"
    fit(module_of(parts, strategy="MSS"), states, 3, tmp_path)
    (tmp_path / "step=3.ckpt").rename(gone)
    fit(module_of(parts, strategy="SS", start_from=str(gone)), states, 3, tmp_path)
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="gone"):
        fit(module_of(parts, strategy="SS", start_from=str(gone)), states, 3)
    resumed = module_of(parts, strategy="SS", start_from=str(gone))
    fit(resumed, states, 4, resume=tmp_path / "step=3.ckpt")
    assert resumed.global_step == 4
    converted = mtsk([tmp_path / "step=3.ckpt"])
    assert converted.state_dict().keys() == resumed.model.state_dict().keys()
