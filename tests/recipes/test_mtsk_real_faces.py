"""The recipe of real talking faces: alignment, lips, states and a crowd, on clips of a second."""

from __future__ import annotations

import json
import random
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.asr.talking import write_parts, write_video
from tests.asr.tiny_dllm import write_whisper
from tests.recipes.test_mtsk_recipes import RECIPE, run, script
from tokenthrift.cli import main
from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, avhubert_config, normalize
from tokenthrift.mtsk.training.clips import CachedStates, ManifestClips

align, real_lips, real_states, crowd = map(script, ("align", "real_lips", "real_states", "crowd"))
TEXTS = ("bin blue at f two now", "set red by a one soon", "lay green in z six please", "place white with o nine again")


# Alignment


def test_a_letter_is_spoken_by_its_name() -> None:
    spelled = align.spell("at a", "en-gb-x-rp", True)
    assert (spelled.names[0], spelled.names[-1]) == ("_", "_")
    assert spelled.words[0] == -1
    assert [word for word, _ in [(w, 0) for w in dict.fromkeys(spelled.words)]] == [-1, 0, 1]
    assert align.pronounce("a", "en-gb-x-rp", True) == align.pronounce("ay", "en-gb-x-rp", False)
    assert align.pronounce("a", "en-gb-x-rp", False) != align.pronounce("a", "en-gb-x-rp", True)


@given(st.integers(0, 10_000), st.integers(3, 6))
@settings(max_examples=30, deadline=None)
def test_no_path_is_better_than_the_one_found(seed: int, frames: int) -> None:
    words = [-1, 0, -1, 1, -1]
    scores = np.random.default_rng(seed).normal(size=(frames, len(words))).astype(np.float32)

    def allowed(path: tuple[int, ...]) -> bool:
        steps = all(b - a in (0, 1) or (b - a == 2 and words[a + 1] < 0 and words[b] >= 0) for a, b in pairwise(path))
        return steps and path[0] in (0, 1) and path[-1] in (3, 4)

    paths = [path for path in product(range(len(words)), repeat=frames) if allowed(path)]
    best = max(sum(scores[t, p] for t, p in enumerate(path)) for path in paths)
    found = align.viterbi(scores, words)
    assert allowed(tuple(found.tolist()))
    assert scores[np.arange(frames), found].sum() == pytest.approx(best, abs=1e-4)


def recordings(count: int = 24) -> tuple[list[Tensor], list[Tensor], list[Any], list[list[int]]]:
    """States of which each phoneme has its own direction, sounds that are quiet at the ends, phonemes, first frames."""
    rng = random.Random(0)
    spelled = [align.spell(TEXTS[i % len(TEXTS)], "en-gb-x-rp", True) for i in range(count)]
    names = sorted({name for one in spelled for name in one.names})
    directions = torch.randn(len(names), 32, generator=torch.Generator().manual_seed(1))
    states, sounds, truth = [], [], []
    for one in spelled:
        lead, tail, starts = rng.randrange(8, 20), rng.randrange(8, 20), []
        frames = [names.index("_")] * lead
        for name, word in zip(one.names, one.words, strict=True):
            if word >= 0:
                starts.append(len(frames))
                frames += [names.index(name)] * rng.randrange(3, 9)
        sound = 0.001 * torch.randn(320 * (len(frames) + tail))
        sound[320 * lead : 320 * len(frames)] *= 300
        frames += [names.index("_")] * tail
        states.append(directions[torch.tensor(frames)] + 0.5 * torch.randn(len(frames), 32))
        sounds.append(sound)
        truth.append(starts)
    return states, sounds, spelled, truth


def test_borders_are_found_from_a_flat_start() -> None:
    torch.manual_seed(0)
    states, sounds, spelled, truth = recordings()
    off = []
    for path, one, starts in zip(align.align(states, sounds, spelled, rounds=4), spelled, truth, strict=True):
        places = [i for i, word in enumerate(one.words) if word >= 0]
        off += [abs(int(np.argmax(path == p)) - start) for p, start in zip(places, starts, strict=True)]
    assert np.mean(np.array(off) <= 1) > 0.95


def test_times_name_words_and_phonemes() -> None:
    spelled = align.Spelled(["_", "a", "t", "_", "n", "_"], [-1, 0, 0, -1, 1, -1])
    found = align.times(np.array([0, 0, 1, 1, 2, 4, 4, 5]), spelled, "at n")
    assert found["words"] == [[0.04, 0.1, "at"], [0.1, 0.14, "n"]]
    assert found["phonemes"] == [[0.0, "_"], [0.04, "a"], [0.08, "t"], [0.1, "n"], [0.14, "_"]]


def test_recordings_beyond_one_pass_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper, lines = write_whisper(tmp_path / "whisper"), []
    for i in range(4):
        seconds = 31.0 if i == 1 else 1.2
        soundfile.write(tmp_path / f"{i}.flac", np.random.default_rng(i).normal(0, 0.1, int(16_000 * seconds)), 16_000)
        lines.append(json.dumps({"audio_filepath": f"{i}.flac", "text": TEXTS[i]}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    run(monkeypatch, "align", tmp_path / "manifest.jsonl", tmp_path / "aligned.jsonl", "--whisper", whisper)
    found = [json.loads(line) for line in (tmp_path / "aligned.jsonl").read_text().splitlines()]
    assert [row["audio_filepath"] for row in found] == ["0.flac", "2.flac", "3.flac"]
    assert all([word for _, _, word in row["words"]] == row["text"].split() for row in found)


# Lips


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six aligned clips of a second: crops, sound, words of four frames each."""
    folder = tmp_path_factory.mktemp("clips")
    rng, lines = np.random.default_rng(0), []
    for i, split in enumerate(("train", "train", "train", "dev", "dev", "test")):
        write_video(folder / f"{i}.mkv", rng.integers(0, 255, (30, 96, 96), dtype=np.uint8))
        soundfile.write(folder / f"{i}.flac", rng.normal(0, 0.1, 19_200), 16_000)
        words: list[tuple[float, float, str]] = [
            (0.12 + 0.16 * k, 0.28 + 0.16 * k, word) for k, word in enumerate(TEXTS[i % 4].split())
        ]
        phonemes = [[0.0, "_"], *([start, word[0]] for start, _, word in words), [1.08, "_"]]
        row = {"video_filepath": f"{i}.mkv", "audio_filepath": f"{i}.flac", "duration": 1.2, "text": TEXTS[i % 4]}
        lines.append(json.dumps({**row, "split": split, "speaker": "s1", "words": words, "phonemes": phonemes}) + "\n")
    (folder / "aligned.jsonl").write_text("".join(lines))
    return folder / "aligned.jsonl"


def classes(manifest: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    words = ["", *sorted({word for row in rows for _, _, word in row["words"]})]
    return words, sorted({name for row in rows for _, name in row["phonemes"]})


def test_frames_have_the_word_that_is_said_soon_after(aligned: Path) -> None:
    words, phonemes = classes(aligned)
    clips = real_lips.Clips(aligned, words, phonemes, "train")
    first = [words[i] for i in clips.words[0].tolist()]
    assert first[:2] == ["", ""]
    assert list(dict.fromkeys(first[2:])) == [*TEXTS[0].split(), ""]
    assert first.count("blue") == 4
    assert clips.borders[0] == [2, 6, 10, 14, 18, 22, 26]


def test_a_training_clip_goes_on_with_another_one_at_a_word(aligned: Path) -> None:
    words, phonemes = classes(aligned)
    clips = real_lips.Clips(aligned, words, phonemes, "train")
    seen = set()
    for seed in range(40):
        pictures, word, phoneme = clips.training_clip(seed % 3, random.Random(seed))
        assert pictures.shape[1:] == (44, 44)
        assert len(pictures) == len(word) == len(phoneme)
        said = [words[i] for i in dict.fromkeys(word.tolist()) if i]
        own = TEXTS[seed % 3].split()
        cut = sum(a == b for a, b in zip(said, own, strict=True))
        assert said[:cut] == own[:cut]
        assert any(said[cut:] == text.split()[cut:] for text in TEXTS[:3])
        seen.add(" ".join(said))
    assert len(seen - set(TEXTS)) > 3


def test_the_grammar_reads_six_words() -> None:
    words = ["", *sorted({word for slot in real_lips.GRID for word in slot})]
    scores = torch.full((40, len(words)), -6.0)
    scores[:, 0] = -1.0
    for k, word in enumerate(TEXTS[0].split()):
        scores[6 + 5 * k : 11 + 5 * k, words.index(word)] = 0.0
    scores[20:22] = -6.0
    scores[20:22, words.index("zero")] = 0.0  # no word of this slot
    assert real_lips.read_grid(scores, words) == TEXTS[0]


def test_lips_are_learned_and_a_stopped_run_goes_on(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--width", 64, "--layers", 1, "--channels", 4, 4, 4, 4, "--batch", 2, "--every", 1)
    run(monkeypatch, "real_lips", aligned, tmp_path, "--steps", 1, *sizes)
    first = load_file(tmp_path / "avhubert.safetensors")
    run(monkeypatch, "real_lips", aligned, tmp_path, "--steps", 2, *sizes)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    found = load_file(tmp_path / "avhubert.safetensors")
    assert avhubert_config(found).channels == (4, 4, 4, 4)
    name = "feature_extractor_video.resnet.frontend3D.0.weight"
    assert not torch.equal(first[name], found[name])
    AvHubert(64, 1, 1, 256, (4, 4, 4, 4)).load_state_dict(found)


def test_the_rate_is_a_function_of_the_step() -> None:
    rates = [real_lips.rate_at(step, 100, 2.0) for step in range(1, 101)]
    assert max(rates) == rates[14] == 2.0
    assert rates[0] == pytest.approx(2 / 15)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


# States


def test_states_of_real_clips(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper = write_whisper(tmp_path / "whisper")
    (tmp_path / "lips").mkdir()
    save_file(AvHubert(64, 1, 1, 64, (4, 4, 4, 4)).state_dict(), tmp_path / "lips" / "avhubert.safetensors")
    rows = [json.dumps({"audio_filepath": str(aligned.parent / f"{i}.flac"), "speaker": f"v{i}"}) for i in range(3)]
    (tmp_path / "voices.jsonl").write_text("\n".join(rows))
    run(monkeypatch, "crowd", tmp_path / "voices.jsonl", tmp_path / "crowd.flac", "--seconds", 2, "--voices", 2)
    assert soundfile.info(tmp_path / "crowd.flac").frames == 32_000
    parts = ("--whisper", whisper, "--avhubert", tmp_path / "lips", "--crowd", tmp_path / "crowd.flac")
    for _ in range(2):
        run(monkeypatch, "real_states", aligned, tmp_path / "states", *parts, "--passes", 2)
    shards = sorted((tmp_path / "states" / "train").glob("*.safetensors"))
    assert [shard.name for shard in shards] == ["00.safetensors", "01.safetensors"]
    data = CachedStates(shards)
    assert len(data) == 6
    assert all(len(text.split()) == 6 for text in data.texts)
    clip = data[0]
    assert clip.audio is not None
    assert clip.video is not None
    assert abs(len(clip.audio) - 2 * len(clip.video)) <= 2
    assert CachedStates([tmp_path / "states" / "dev" / "dev.safetensors"]).texts == [TEXTS[3], TEXTS[0]]


def test_sound_and_pictures_of_two_clips_are_cut_alike(aligned: Path) -> None:
    talkers = real_states.Talkers(aligned, "train")
    for sound, number in zip(talkers.sounds, (0.1, 0.2, 0.3), strict=True):
        sound[:] = number
    talkers.pictures = [torch.full((30, 96, 96), number, dtype=torch.uint8) for number in (1, 2, 3)]
    cuts = 0
    for seed in range(20):
        text, sound, pictures = talkers.spliced(0, random.Random(seed))
        changes = (pictures[1:, 0, 0] != pictures[:-1, 0, 0]).nonzero()
        if len(changes):
            cuts += 1
            frame = int(changes[0]) + 1
            assert text != TEXTS[0]
            assert frame in talkers.borders[0]
            assert sound[640 * frame - 200] == pytest.approx(0.1)
            assert sound[640 * frame + 200] == pytest.approx(0.1 * int(pictures[-1, 0, 0]))
    assert cuts > 3


def test_a_trained_language_model_can_be_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    card = RECIPE.parents[1] / "model_cards" / "mtsk-tiny-en"
    run(monkeypatch, "language_model", tmp_path / "llama", "--of", card)
    ours = LlamaMtsk.from_pretrained(card).language_model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (tmp_path / "llama" / "tokenizer.json").exists()


def test_small_pictures_are_means_of_squares() -> None:
    video = torch.randint(0, 256, (2, 96, 96), dtype=torch.uint8)
    small, whole = normalize(video, 88, 2), normalize(video, 88)
    assert small.shape == (2, 44, 44)
    assert torch.allclose(small[1, 3, 5], whole[1, 6:8, 10:12].mean(), atol=1e-5)


def test_real_voices_get_lips_that_move_with_their_phonemes(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phonemes = [[0.0, "_"], [0.2, "m"], [0.36, "A:"], [0.72, "m"], [0.9, "_"]]
    rows = [{"audio_filepath": str(aligned.parent / f"{i}.flac"), "duration": 1.2, "text": "mum"} for i in range(2)]
    lines = [json.dumps({**row, "speaker": f"v{i}", "phonemes": phonemes}) + "\n" for i, row in enumerate(rows)]
    (tmp_path / "aligned.jsonl").write_text("".join(lines))
    for _ in range(2):
        run(monkeypatch, "rendered", tmp_path / "aligned.jsonl", tmp_path / "out")
    data = ManifestClips(tmp_path / "out" / "manifest.jsonl")
    assert [row["lips"] for row in data.rows] == ["rendered", "rendered"]
    clip, other = data[0], data[1]
    assert clip.audio is not None
    assert clip.video is not None
    assert other.video is not None
    assert (len(clip.video), len(clip.audio)) == (30, 19_200)
    video = clip.video.float()
    # The mouth is as it was in the closed "m" after the open vowel, and unlike that in between.
    assert (video[12] - video[5]).abs().mean() > 2 * (video[18] - video[5]).abs().mean()
    assert not torch.equal(clip.video, other.video)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("name", ["grid", "small"])
def test_the_larger_recipes_run(name: str, aligned: Path, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    own = {f"model.init_args.config.{part}": value for part, value in parts.items()}
    own |= {"data.init_args.train": str(aligned), "data.init_args.dev": str(aligned), "data.init_args.dev_items": "2"}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "true", "trainer.default_root_dir": str(tmp_path)}
    own |= {"data.init_args.max_frames": "60", "data.init_args.noise": "null", "model.init_args.start_from": "null"}
    own |= {"model.init_args.config.projector_hidden_size": "16", "model.init_args.optim.warmup_steps": "1"}
    own |= {"trainer.callbacks+": "lightning.pytorch.callbacks.EMAWeightAveraging"}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in ("tiny", name)]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0
