"""The recipe of real voices with rendered lips: an encoder that expects sound, a reader of both, training steps."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.asr.tiny_dllm import speech
from tests.recipes.mtsk_speech import RATES, SIZES, TEXTS, decoder, losses_of, start
from tests.recipes.test_mtsk_recipes import RECIPE, run, script
from tokenthrift.cli import main
from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.config import VideoConfig
from tokenthrift.mtsk.training.clips import CachedStates
from tokenthrift.whisper import sinusoids

rendered_lips, states = script("rendered_lips"), script("states")
SMALL = ("--width", 64, "--layers", 1, "--channels", 4, 4, 8, 8)


class Given(torch.nn.Module):
    """In place of a visual encoder: its states are given, (B, T, 1, W)."""

    def forward(self, video: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return video[:, :, 0]


def reader_of(parts: Path, folder: Path, audio: tuple[int, ...] = RATES, video: tuple[int, ...] = (2, 5)) -> Any:
    """A reader of sound and lips around the visual encoder of a folder."""
    visual = states.read_avhubert(str(folder))
    visual.feature_extractor_video.resnet = states.Seen()
    return decoder.Reader(start.Whisper(parts / "whisper", 120).decoder, audio, video, 80, visual).eval()


RUNS = {"whole": (7,), "parted": (4, 7)}  # steps at which a run ends


def steps_of(own: tuple[Any, ...], out: Path, steps: int) -> list[tuple[Any, list[str], bool]]:
    """Scales and texts of each training step of a run of `speech_decoder.py`, and whether its batch has lips."""
    found, losses = [], decoder.losses

    def noted(reader: Any, batch: Any, whisper: Any, scales: Any, expected: Any = None, muted: Any = None) -> Any:
        if expected is not None:  # of training
            found.append((tuple(scales), list(batch.texts), batch.video is not None))
        return losses(reader, batch, whisper, scales, expected, muted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "losses", noted)
        patch.setattr(
            "sys.argv",
            ["speech_decoder", *(str(out if part == "OUT" else part) for part in own), "--steps", str(steps)],
        )
        decoder.main()
    return found


@pytest.fixture(scope="module")
def lips(parts: Path) -> Path:
    """The states of recordings with rendered lips, in two passes; `avhubert` beside them is the visual encoder."""
    rows = [json.loads(line) for line in (parts / "manifest.jsonl").read_text().splitlines()]
    spoken = {"phonemes": [[0.0, "_"], [0.2, "m"], [0.4, "A:"], [0.8, "_"]], "speaker": "one"}
    (parts / "aligned.jsonl").write_text("".join(json.dumps(row | spoken) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        options = ("--whisper", parts / "whisper", "--passes", 0, 1)
        run(patch, "speech_states", parts / "aligned.jsonl", parts / "lips", *options)
        learned = (parts / "aligned.jsonl", parts / "lips")
        own = (*SMALL, "--steps", 4, "--context-steps", 40)
        run(patch, "rendered_lips", *learned, parts / "avhubert", *own)
    return parts / "lips"


def test_states_of_rendered_lips_stand_beside_those_of_sound(lips: Path) -> None:
    data = CachedStates([lips / "train/00-000.safetensors"])
    assert data.texts == list(TEXTS)
    clip, noisy = data[0], CachedStates([lips / "train/01-000.safetensors"])[0]
    assert noisy.video is not None
    assert clip.video is not None
    assert torch.equal(noisy.video, clip.video), "noise does not move a mouth"
    assert clip.audio is not None
    assert (clip.audio.shape, clip.video.shape) == ((50, 32), (25, 8))
    mouth = clip.video.float()
    assert (mouth[15] - mouth[2]).norm() > (mouth[3] - mouth[2]).norm(), "an open mouth is not a closed one"


def test_what_was_done_is_kept_and_other_options_are_refused(
    parts: Path, lips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [
        lips / "train/01-000.safetensors",
        *(parts / f"avhubert/{name}.safetensors" for name in ("avhubert", "sound")),
    ]
    before = [load_file(path) for path in same]
    own = (parts / "aligned.jsonl", lips, parts / "avhubert", *SMALL, "--context-steps", 40)
    settings = lips / "settings.json"
    said = settings.read_text()
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "rendered_lips", *own, "--steps", 4)
        assert "step" not in capsys.readouterr().out, "nothing is trained again"
        for tensors, path in zip(before, same, strict=True):
            now = load_file(path)
            assert all(torch.equal(now[key], value) for key, value in tensors.items())
        with pytest.raises(SystemExit, match="was begun with"):
            run(patch, "rendered_lips", *own, "--steps", 8)
        settings.write_text(json.dumps({"trailing_silence": 0.0, "speeds": [0.9, 1.0]}))
        with pytest.raises(SystemExit):
            run(patch, "rendered_lips", *own, "--steps", 4)
        settings.write_text(said)
        assert "lips move at one speed" in capsys.readouterr().err


def test_a_stopped_training_ends_as_an_unbroken_one(parts: Path, lips: Path, tmp_path: Path) -> None:
    data = rendered_lips.Speakers(parts / "aligned.jsonl", lips, "train")
    seen = CachedStates([next((parts / "avhubert").glob("seen-train-*.safetensors"))])
    asked: list[int] = []

    def video(index: int, _: random.Random) -> torch.Tensor:
        frames = seen[index].video
        assert frames is not None
        return frames.float()

    def until(index: int, rng: random.Random) -> torch.Tensor:
        asked.append(index)
        if len(asked) > 12:  # in the fourth step, of four recordings each
            raise KeyboardInterrupt
        return video(index, rng)

    ends = []
    for name in ("whole", "parted"):
        torch.manual_seed(0)
        teacher = rendered_lips.Teacher(64, 1, (4, 4, 8, 8), 32)
        teacher.encoder.feature_extractor_video.resnet = states.Seen()
        kept = (tmp_path / name, 6, 1e-3, {"rate": "1"}, 2)
        if name == "parted":
            with pytest.raises(KeyboardInterrupt):
                rendered_lips.learn(teacher, data, until, *kept)
        rendered_lips.learn(teacher, data, video, *kept)
        ends.append(teacher.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_states_of_a_saved_encoder_have_a_place_of_their_own(parts: Path, lips: Path, tmp_path: Path) -> None:
    """What the convolutions saw was kept, so the transformer has read no pictures."""
    shutil.copy(parts / "avhubert/avhubert.safetensors", tmp_path)
    own = (parts / "aligned.jsonl", lips, parts / "avhubert", *SMALL, "--steps", 4, "--context-steps", 40)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "rendered_lips", *own, "--states-of", tmp_path)
    data = rendered_lips.Speakers(parts / "aligned.jsonl", lips, "dev")
    encoder = states.read_avhubert(str(tmp_path))
    pictures = rendered_lips.normalize(rendered_lips.crop_of(data.rows[0], random.Random(0)), 88, 2)
    with torch.no_grad():
        expected = encoder(pictures[None])[0]
    found = CachedStates([tmp_path / "states/dev/00-000.safetensors"])[0]
    assert found.video is not None
    torch.testing.assert_close(found.video.float(), expected, rtol=0.1, atol=0.1)
    seen = CachedStates([lips / "dev/00-000.safetensors"])[0]
    assert seen.video is not None
    assert seen.video.shape == (25, 8), "what was seen stays where it is"
    assert len(list((tmp_path / "states/train").glob("*.safetensors"))) == 2
    other = {name: value + 1 if "resnet" in name else value for name, value in encoder.state_dict().items()}
    save_file(other, tmp_path / "avhubert.safetensors")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="is of other convolutions"):
        run(patch, "rendered_lips", *own, "--states-of", tmp_path)
    shutil.copytree(tmp_path / "states", tmp_path / "old")
    learn = (parts / "whisper", tmp_path / "old", tmp_path / "out", *SIZES, "--video-rates", 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="has 64 numbers a frame, not 8"):
        run(patch, "speech_decoder", *learn, "--lips", parts / "avhubert")


def test_the_encoder_learns_visemes_and_sound(parts: Path, lips: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = rendered_lips.Speakers(parts / "aligned.jsonl", lips, "train")
    teacher = rendered_lips.Teacher(64, 1, (4, 4, 8, 8), 32)
    videos = [rendered_lips.normalize(rendered_lips.crop_of(data.rows[i], random.Random(i)), 88, 2) for i in range(4)]
    every = (range(4), videos, rendered_lips.scale_of(data))
    before = rendered_lips.loss_of(teacher, data, *every)
    rendered_lips.learn(teacher, data, lambda i, _: videos[i], tmp_path / "kept.ckpt", 40, 3e-3)
    after = rendered_lips.loss_of(teacher, data, *every)
    assert after[0].item() < 0.5 * before[0].item()
    assert after[1]["frames right"] > 0.8
    assert after[1]["sound explained"] > 0.2


def test_rendered_lips_need_the_states_of_their_recordings(parts: Path, lips: Path, tmp_path: Path) -> None:
    lines = (parts / "aligned.jsonl").read_text().splitlines(keepends=True)
    (parts / "fewer.jsonl").write_text("".join(lines[1:]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="has no pass 0 over all recordings"):
        run(patch, "rendered_lips", parts / "fewer.jsonl", lips, tmp_path, *SMALL)


def test_synthetic_speech_is_aligned_and_gets_lips(parts: Path, lips: Path, tmp_path: Path) -> None:
    said = [("mop", "train"), ("hat", "dev"), ("a palm", "train")]
    clips = [(speech(1.0, i).numpy() * 20_000).astype(np.int16) for i in range(3)]
    rows = json.dumps([{"text": text, "split": split} for text, split in said])
    (tmp_path / "synthetic").mkdir()
    for number in range(3):
        shard = tmp_path / f"synthetic/000{number}-slt.npz"
        np.savez(shard, audio=np.concatenate(clips), offset=np.cumsum([0, *map(len, clips)]), rows=rows)
    shutil.copytree(lips, tmp_path / "lips")
    whisper, aligned = ("--whisper", parts / "whisper"), parts / "aligned.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "align", tmp_path / "synthetic", tmp_path / "synthetic.jsonl", *whisper, "--every", 2)
        lines = [json.loads(line) for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()]
        assert [(line["shard"], line["text"]) for line in lines] == [
            (f"000{number}-slt", text) for number in (0, 2) for text in ("mop", "a palm")
        ]
        assert {name for _, name in lines[0]["phonemes"]} >= {"m", "p"}
        own = (aligned, tmp_path / "lips", tmp_path / "avhubert", *SMALL, "--steps", 4, "--context-steps", 4)
        with pytest.raises(SystemExit, match="has no states of 0000-slt"):
            run(patch, "rendered_lips", *own, "--synthetic", tmp_path / "synthetic.jsonl")
        synthetic = ("--passes", 0, 1, "--synthetic", tmp_path / "synthetic")
        run(patch, "speech_states", aligned, tmp_path / "lips", *whisper, *synthetic)
        run(patch, "rendered_lips", *own, "--synthetic", tmp_path / "synthetic.jsonl")
    found = {
        shard.name: CachedStates([shard])[1].video
        for shard in sorted((tmp_path / "lips/train").glob("*-s*.safetensors"))
    }
    assert [name for name, video in found.items() if video is None] == [f"0{n}-s0001-slt.safetensors" for n in (0, 1)]
    clean, noisy = (found[f"0{n}-s0002-slt.safetensors"] for n in (0, 1))
    assert clean is not None
    assert noisy is not None
    assert clean.shape == (25, 8)
    assert torch.equal(clean, noisy)
    # Steps with lips are of what has some, and a stopped run goes on with the batches that would have come.
    sizes = (parts / "whisper", tmp_path / "lips", "OUT", *SIZES, "--video-rates", 2, 5, "--sound-every", 3)
    often = ("--lips", tmp_path / "avhubert", "--scales-per-step", 1, "--seconds", 3, "--every", 100)
    whole, parted = (
        [step for n in ends for step in steps_of((*sizes, *often), tmp_path / name, n)] for name, ends in RUNS.items()
    )
    assert whole == parted
    assert [any(rates.video for rates in scales) for scales, _, _ in whole] == [
        True,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert all(lips_are_there for scales, _, lips_are_there in whole if scales[0].video)


@pytest.fixture(scope="module")
def seeing(parts: Path, lips: Path, taught: Path) -> Path:
    """The folder of a start of sound and lips."""
    out = parts / "seeing"
    own: tuple[Any, ...] = ("--video-rates", 2, 5)
    with pytest.MonkeyPatch.context() as patch:
        learned = ("--steps", 2, "--every", 1, "--lips", parts / "avhubert", "--start", taught)
        run(patch, "speech_decoder", parts / "whisper", lips, out, *SIZES, *own, *learned)
        own = (*own, "--taught", out / "taught.safetensors", "--avhubert", out)
        run(patch, "speech_start", parts / "whisper", parts / "manifest.jsonl", out, *SIZES, *own)
    return out


def test_a_video_token_begins_as_the_mean_of_the_sound_to_expect(parts: Path, lips: Path) -> None:
    read = load_file(parts / "avhubert/sound.safetensors")
    reader = reader_of(parts, parts / "avhubert")
    for rate, project in zip((2, 5), reader.video_proj, strict=True):
        project.load_state_dict(start.projector(rate, read["weight"], 80, read["bias"]).state_dict())
    encoded = decoder.encoded_of(decoder.collate([CachedStates([lips / "dev/00-000.safetensors"])[0]]))
    with torch.no_grad():
        seen = reader.visual(encoded.video[:, :, None], encoded.video_lengths)[0]
    sound = (seen + sinusoids(*seen.shape)) @ read["weight"].T + read["bias"]
    with torch.no_grad():
        for rate in (2, 5):
            tokens, _ = reader.tokens(encoded, "video", rate)
            whole = len(sound) // rate
            expected = sound[: whole * rate].unflatten(0, (whole, rate)).mean(1)
            torch.testing.assert_close(tokens[0, :whole], expected, rtol=1e-3, atol=1e-3)


def test_a_start_that_sees_reads_as_what_was_taught(parts: Path, lips: Path, seeing: Path) -> None:
    model = LlamaMtsk.from_pretrained(seeing / "start")
    assert model.config.scales == (*(Rates(audio=a) for a in RATES), *(Rates(a, v) for v in (2, 5) for a in RATES))
    whisper = start.Whisper(parts / "whisper", 120)
    reader = reader_of(parts, seeing)
    reader.load_state_dict(load_file(seeing / "taught.safetensors"), strict=False)
    reader.visual = Given()
    encoded = model.encode([speech(1.0, 1)], [torch.randn(25, 64, generator=torch.Generator().manual_seed(0))])
    for expected, found in losses_of(whisper, reader, model, encoded):
        assert found == pytest.approx(expected, rel=0.1, abs=0.2)
    # The flags that a language model of this kind needs on a token of sound or video.
    tokens, _ = model.tokens(encoded, "video", 2)
    assert torch.equal(tokens[0, :, -6:], torch.tensor([300.0, 0, 0, 0, 0, 0]).expand(len(tokens[0]), 6))


def test_lips_need_a_decoder_that_was_taught_with_their_encoder(
    parts: Path, seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (*SIZES, "--avhubert", parts / "avhubert")
    for more in ((), ("--taught", seeing / "taught.safetensors", "--video-rates", 2, 5)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            run(patch, "speech_start", parts / "whisper", parts / "manifest.jsonl", tmp_path, *own, *more)
    assert "give its folder to --avhubert" in capsys.readouterr().err


def test_sound_is_muted_only_where_lips_are_read(parts: Path, lips: Path) -> None:
    whisper = start.Whisper(parts / "whisper", 120)
    reader = reader_of(parts, parts / "avhubert", RATES[:1], (2,))
    data = CachedStates([lips / "train/00-000.safetensors"])
    batch = decoder.collate([data[i] for i in range(2)])
    with torch.no_grad():
        (sound, both), (again, alone) = (
            torch.stack(list(decoder.losses(reader, batch, whisper, reader.scales, None, muted)))
            for muted in (torch.tensor([False, False]), torch.tensor([True, True]))
        )
        silent = decoder.replace(batch, audio=torch.zeros_like(batch.audio))
        expected = next(decoder.losses(reader, silent, whisper, reader.scales[1:]))
        looked = decoder.development(reader, [batch], whisper)
    assert again == sound
    assert alone != both
    torch.testing.assert_close(alone, expected)
    assert list(looked.values()) == pytest.approx([float(sound), float(alone)], abs=1e-3), (
        "development is of lips alone"
    )


def test_a_run_begins_where_another_ended(parts: Path, lips: Path, taught: Path, tmp_path: Path) -> None:
    """Without learning rates nothing moves."""
    still = ("--steps", 1, "--decoder-rate", 0, "--rest-rate", 0, "--projector-rate", 1e-30, "--lips-rate", 0)
    own = (*SIZES, "--video-rates", 2, *still)
    begin = parts / "avhubert"
    with pytest.MonkeyPatch.context() as patch:
        learn = (patch, "speech_decoder", parts / "whisper")
        run(*learn, lips, tmp_path / "one", *own, "--start", taught, "--lips", begin)
        first = tmp_path / "one/taught.safetensors"
        run(*learn, lips, tmp_path / "two", *own, "--start", first, "--lips", tmp_path / "one")
        with pytest.raises(SystemExit, match="has no lips"):
            run(*learn, parts / "states", tmp_path / "three", *own, "--lips", begin)
        with pytest.raises(SystemExit, match="give its folder to --lips"):
            run(*learn, lips, tmp_path / "three", *own, "--start", first, "--lips", begin)
        for wrong in (own, (*SIZES, "--lips", begin)):
            with pytest.raises(SystemExit, match="go together"):
                run(*learn, lips, tmp_path / "four", *wrong)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            run(*learn, lips, tmp_path / "five", *SIZES, "--start", first)
    before, one, two = map(load_file, (taught, first, tmp_path / "two/taught.safetensors"))
    assert all(torch.allclose(one[name], value) for name, value in before.items())
    assert one.keys() == two.keys()
    encoders = [load_file(folder / "avhubert.safetensors") for folder in (begin, tmp_path / "one", tmp_path / "two")]
    for encoder in encoders[1:]:
        assert all(torch.allclose(encoder[name], value) for name, value in encoders[0].items())
    read = load_file(parts / "avhubert/sound.safetensors")
    begun = start.projector(2, read["weight"], 80, read["bias"])[0]
    assert torch.allclose(one["video_proj.0.0.weight"][:64], begun.weight[:64])
    assert torch.allclose(one["video_proj.0.0.bias"][:64], begun.bias[:64])
    assert all(torch.allclose(two[name], value) for name, value in one.items())


def test_positions_tell_equal_pictures_apart(seeing: Path) -> None:
    model = LlamaMtsk.from_pretrained(seeing / "start")
    tokens, _ = model.tokens(model.encode(video=[torch.ones(20, 64)]), "video", 2)
    assert (tokens[0, 0] - tokens[0, 9]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="an even video.hidden_size"):
        VideoConfig(hidden_size=63, features_only=True, positions=True)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_recipe_of_lips_goes_on_from_its_start(parts: Path, lips: Path, seeing: Path, tmp_path: Path) -> None:
    made = (parts / "aligned.jsonl", lips, parts / "avhubert", *SMALL, "--steps", 4, "--context-steps", 40)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "rendered_lips", *made, "--states-of", seeing)
    config = "model.init_args.config"
    own: dict[str, object] = {f"{config}.language_model": seeing / "llama", f"{config}.whisper": parts / "whisper"}
    own |= {f"{config}.avhubert": seeing, f"{config}.projector_hidden_size": 80}
    own |= {f"{config}.audio_rates": list(RATES), "model.init_args.start_from": seeing / "start"}
    own[f"{config}.suppress_tokens"] = "[]"
    own |= {f"data.init_args.{part}": seeing / "states" / part for part in ("train", "dev")}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "2", "trainer.default_root_dir": tmp_path}
    own |= {"data.init_args.max_frames": 60, "data.init_args.dev_items": 1}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in ("tiny", "speech", "lips")]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0
