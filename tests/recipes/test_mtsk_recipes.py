"""The data recipe of Llama-MTSK: phrases, phonemes, mouths, clips and shards, on a scale of seconds."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.asr.talking import SquareFinder, face, write_parts, write_states, write_video
from tests.asr.tiny_dllm import write_whisper
from tokenthrift.cli import main
from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.audiovisual import lips
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert
from tokenthrift.mtsk.training.clips import CachedStates, ManifestClips

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mtsk"


def script(name: str) -> Any:
    """A script of the recipe as a module; scripts import each other by their bare names."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    module = script(name)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()


phrases, visemes, mouth, espeak, grid = map(script, ("phrases", "visemes", "mouth", "espeak", "grid"))


# Phrases


def test_phrases_make_the_folder_they_go_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data" / "phrases.jsonl"
    run(monkeypatch, "phrases", out, "--train", 3, "--dev", 1, "--test", 1)
    assert len(out.read_text().splitlines()) == 5


def test_thirty_thousand_phrases_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[dict[str, int], int]] = []

    def collect(counts: dict[str, int], free: list[tuple[str, str]], seed: int) -> list[dict[str, str]]:
        asked.append((counts, seed))
        return []

    monkeypatch.setattr(phrases, "collect", collect)
    run(monkeypatch, "phrases", tmp_path / "phrases.jsonl")
    ((counts, seed),) = asked
    assert counts["train"] >= 30_000
    assert seed == 0


def test_texts_are_of_one_split_each() -> None:
    free = [(f"Number {i} is free.", f"number {i} is free") for i in range(400)]
    rows = list(phrases.collect({"train": 2000, "dev": 100, "test": 100}, free, 0))
    texts = {split: {r["text"] for r in rows if r["split"] == split} for split in ("train", "dev", "test")}
    assert all(phrases.split_of(text) == split for split, own in texts.items() for text in own)
    assert Counter(r["split"] for r in rows) == {"train": 2000, "dev": 100, "test": 100}
    kinds = Counter(r["kind"] for r in rows)
    assert kinds["grid"] > kinds["pairs"] > kinds["free"] > 200
    assert rows == list(phrases.collect({"train": 2000, "dev": 100, "test": 100}, free, 0))
    assert all(r["spoken"].split()[3] in (r["text"].split()[3].upper(), "ay") for r in rows if r["kind"] == "grid")


def test_the_name_of_a_grid_clip_spells_its_sentence() -> None:
    assert grid.sentence("bbaf2n") == "bin blue at f two now"
    assert grid.sentence("swizzs") == "set white in z zero soon"
    with pytest.raises(ValueError, match="no name of a GRID clip"):
        grid.sentence("bbaw2n")


def test_real_clips_become_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = RECIPE.parents[2] / "shared" / "data" / "grid"
    if not clips.is_dir():
        pytest.skip(f"no real talking faces at {clips}")
    run(monkeypatch, "grid", clips, tmp_path)
    data = ManifestClips(tmp_path / "manifest.jsonl")
    assert len(data) == 5
    assert data.texts[0] == "bin blue at f two now"
    clip = data[0]
    assert clip.audio is not None
    assert clip.video is not None
    assert clip.video.shape[1:] == (96, 96)
    assert abs(len(clip.audio) / 16_000 - len(clip.video) / 25) < 0.2


# Visemes


@pytest.mark.parametrize("group", phrases.EAR)
def test_pairs_for_the_ear_look_alike(group: str) -> None:
    looks = {
        visemes.viseme_string(n for _, n in espeak.speak(word, espeak.Voice("en-us")).phonemes)
        for word in group.split()
    }
    assert len(looks) == 1


@pytest.mark.parametrize("group", phrases.LIPS)
def test_pairs_for_the_lips_differ_on_the_lips(group: str) -> None:
    words = group.split()
    looks = {visemes.viseme_string(n for _, n in espeak.speak(word, espeak.Voice("en-us")).phonemes) for word in words}
    assert len(looks) == len(words)


def test_phonemes_come_with_their_samples() -> None:
    slow, fast = (espeak.speak("bin blue at F two now", espeak.Voice("en-us+f2", rate=rate)) for rate in (110, 170))
    for spoken in (slow, fast):
        starts = [start for start, _ in spoken.phonemes]
        assert starts == sorted(starts)
        assert starts[-1] <= len(spoken.samples)
        assert [name for _, name in spoken.phonemes][:3] == ["b", "I", "n"]
        assert 0.05 < np.abs(spoken.samples).max() <= 1
        # The lips close where the sound of b starts: before it there is next to nothing to hear.
        assert np.abs(spoken.samples[: starts[0]]).mean() < 0.1 * np.abs(spoken.samples).mean()
    assert len(slow.samples) > 1.2 * len(fast.samples)
    with pytest.raises(ValueError, match="no voice"):
        espeak.speak("no", espeak.Voice("xx-none"))


def test_every_phoneme_of_every_accent_has_a_viseme() -> None:
    talk = script("talk")
    text = (
        "the quick brown fox jumps over the lazy dog judge church oil how pure measure there are few boats fire bottle"
    )
    for accent in talk.ACCENTS:
        names = {name for _, name in espeak.speak(text, espeak.Voice(accent)).phonemes}
        assert all(visemes.visemes_of(name) is not None for name in names)
    with pytest.raises(KeyError, match="no viseme"):
        visemes.visemes_of("%")


def test_lips_close_for_p_and_lead_the_sound() -> None:
    sounds = [(0.0, "a"), (0.4, "p"), (0.5, "a"), (0.9, "_")]
    track = visemes.mouth_track(sounds, 1.0, lead=0.0)
    assert track.shape == (25, len(visemes.PARAMETERS))
    assert track[10:13, 1].min() < 0.1 * track[5, 1]
    early = visemes.mouth_track(sounds, 1.0, lead=0.08)
    assert early[:, 1].argmin() == track[:, 1].argmin() - 2
    assert visemes.frame_visemes(sounds, 1.0, 0.0)[[5, 11, 17]].tolist() == [10, 1, 10]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(sorted(visemes.VISEMES)), min_size=1, max_size=12), st.floats(0.02, 0.3))
def test_a_mouth_stays_within_the_shapes(names: list[str], length: float) -> None:
    sounds = [(i * length, name) for i, name in enumerate(names)]
    track = visemes.mouth_track(sounds, len(names) * length)
    assert np.isfinite(track).all()
    assert (track >= 0).all()
    assert (track <= visemes.SHAPES.max(0) + 1e-9).all()


def test_the_homophene_bound_counts_what_looks_alike() -> None:
    assert visemes.homophene_bound([("bat", (1, 10)), ("mat", (1, 10)), ("pin", (1, 12)), ("mat", (1, 10))]) == 0.25
    assert visemes.homophene_bound([("bat", (1,)), ("din", (4,))]) == 0.0


def test_the_homophene_bound_is_that_of_a_kind_and_of_a_slot() -> None:
    talk = script("talk")
    grid_rows = [{"kind": "grid", "spoken": f"bin blue at {letter} two now"} for letter in "PBBT"]
    pair_rows = [{"kind": "pairs", "spoken": "bat mat"}, {"kind": "free", "spoken": "nobody looks"}]
    found = talk.homophenes(grid_rows + pair_rows)
    # P and B look alike, T does not.
    assert found["kinds"] == {
        "grid": {"homophene_bound": pytest.approx(1 / 24), "words": 24},
        "pairs": {"homophene_bound": 0.5, "words": 2},
    }
    assert found["homophene_bound"] == pytest.approx(2 / 26)
    # Two words that look alike, in different slots.
    assert talk.homophenes([{"kind": "grid", "spoken": "bat mat"}])["homophene_bound"] == 0.0


# Mouths


def test_what_looks_alike_is_drawn_alike() -> None:
    tracks = [visemes.mouth_track([(0.0, first), (0.15, "a"), (0.4, "t")], 0.6) for first in ("p", "b", "m", "k")]
    one, two, three, other = (mouth.draw(track, mouth.face_of(3), 5) for track in tracks)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert (one.float() - other.float()).abs().mean() > 0.3


def test_faces_differ_and_clips_of_a_face_too() -> None:
    track = visemes.mouth_track([(0.0, "a"), (0.3, "p"), (0.5, "_")], 0.6)
    first, again = mouth.draw(track, mouth.face_of(1), 1), mouth.draw(track, mouth.face_of(1), 1)
    assert first.shape == (15, 96, 96)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, mouth.draw(track, mouth.face_of(1), 2))
    assert not torch.equal(first, mouth.draw(track, mouth.face_of(2), 1))
    assert mouth.draw(track, mouth.face_of(1), 1, 88).shape == (15, 88, 88)
    assert (first[3].float() - first[9].float())[40:60].abs().mean() > 3, "open and closed"


# Clips and shards


def test_clips_shards_and_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(phrases.collect({"train": 5, "dev": 2, "test": 2}, [], 0))
    (tmp_path / "phrases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = script("talk")
    monkeypatch.setitem(talk.SPEAKERS, "babble-train", range(3000, 3002))
    monkeypatch.setattr(talk, "babble", lambda split, texts, seconds: torch.rand(16_000) - 0.5)
    run(monkeypatch, "talk", tmp_path / "phrases.jsonl", tmp_path / "speech", "--shard", 3)
    speech = tmp_path / "speech"
    assert sorted(p.name for p in (speech / "train").iterdir()) == ["0000.npz", "0001.npz"]
    clips = [ManifestClips(path) for path in sorted((speech / "test").rglob("manifest.jsonl"))]
    clip = clips[0][0]
    assert clip.audio is not None
    assert clip.video is not None
    assert abs(len(clip.video) / 25 - len(clip.audio) / 16_000) <= 0.02
    assert {row["speaker"] for data in clips for row in data.rows} <= {*talk.SPEAKERS["test"]}
    bound = json.loads((speech / "test" / "homophenes.json").read_text())
    assert sum(kind["words"] for kind in bound["kinds"].values()) == bound["words"] > 0
    before = {p: p.stat().st_mtime_ns for p in speech.rglob("*") if p.is_file()}
    run(monkeypatch, "talk", tmp_path / "phrases.jsonl", speech, "--shard", 3)
    assert {p: p.stat().st_mtime_ns for p in speech.rglob("*") if p.is_file()} == before

    lip_encoder = script("lip_encoder")
    run(monkeypatch, "lip_encoder", speech / "train", tmp_path / "lips", "--steps", 1, "--batch", 2)
    assert (tmp_path / "lips" / "training.ckpt").exists()
    small = AvHubert(64, 1, 1, 64, (4, 4, 4, 4))
    save_file(small.state_dict(), tmp_path / "lips" / "avhubert.safetensors")
    assert lip_encoder.rows_of(speech / "train" / "0001.npz")[0][0]["text"]
    whisper = write_whisper(tmp_path / "whisper")
    run(monkeypatch, "states", speech, tmp_path / "states", "--whisper", whisper, "--avhubert", tmp_path / "lips")
    found = CachedStates(sorted((tmp_path / "states" / "train").glob("*.safetensors")))
    assert found.texts == [row["text"] for row in rows if row["split"] == "train"]
    state = found[3]
    assert state.audio is not None
    assert state.video is not None
    assert (state.audio.shape[1], state.video.shape[1]) == (32, 64)
    assert abs(len(state.audio) - 2 * len(state.video)) <= 2
    assert state.audio.isfinite().all()
    assert len(CachedStates(sorted((tmp_path / "states" / "dev").glob("*.safetensors")))) == 2


def test_nobody_is_heard_or_seen_in_two_splits() -> None:
    talk = script("talk")
    voices = [name for names in talk.VARIANTS.values() for name in names.split()]
    assert len(voices) == len(set(voices))
    people = [speaker for own in talk.SPEAKERS.values() for speaker in own]
    assert len(people) == len(set(people))


def test_the_small_language_model_knows_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    rows = list(phrases.collect({"train": 300}, [], 0))
    (tmp_path / "phrases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, "language_model", tmp_path / "phrases.jsonl", tmp_path / "llama", "--width", 64, "--layers", 1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "llama" / "tokenizer.json"))
    assert len(tokenizer.encode("Transcribe speech and video to text.").ids) <= 8
    for text in ("bin blue at f two now", "not bat but mat"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text


@pytest.mark.parametrize("name", ["tiny", "lrs3_avsr_ms", "lrs3_avsr_ss", "lrs3_avsr_mss"])
def test_recipes_comment_every_key_of_theirs(name: str) -> None:
    import dataclasses
    import inspect

    from tokenthrift.mtsk import MtskDataModule, MtskModule
    from tokenthrift.mtsk.training.assembly import AssemblyConfig
    from tokenthrift.training.optim import OptimConfig

    text = (RECIPE / f"{name}.yaml").read_text()
    recipe = yaml.safe_load(text)
    for part, kind in (("model", MtskModule), ("data", MtskDataModule)):
        given = set(recipe[part]["init_args"])
        assert given == set(inspect.signature(kind).parameters)
    for part, config in (("config", AssemblyConfig), ("optim", OptimConfig)):
        assert set(recipe["model"]["init_args"][part]) == {field.name for field in dataclasses.fields(config)}
    strategy = name.rpartition("_")[2].upper()
    assert recipe["model"]["init_args"]["config"]["strategy"] == (strategy if strategy != "TINY" else "MS")
    own = text[text.index("model:") :].splitlines()
    assert [line for line in own if line.startswith("    ") and "#" not in line] == []


def test_a_corpus_is_cropped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lips, "_FaceFinder", SquareFinder)
    write_video(tmp_path / "face.mkv", np.stack([face()] * 12), 12, torch.rand(8_000) - 0.5, 8_000)
    write_video(tmp_path / "wall.mkv", np.full((5, 120, 160), 20, np.uint8))
    (tmp_path / "broken.mkv").write_bytes(b"no film")
    names = ("face", "wall", "broken", "mute")
    rows = [{"text": name, "duration": 1.0, "video_filepath": f"{name}.mkv"} for name in names]
    rows[3] |= {"video_filepath": "face.mkv", "audio_filepath": "wall.mkv"}
    rows[0]["audio_filepath"] = "face.mkv"
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        run(monkeypatch, "crop", tmp_path / "all.jsonl", tmp_path / "out")
        (clip,) = [data[i] for data in [ManifestClips(tmp_path / "out" / "manifest.jsonl")] for i in range(len(data))]
        assert clip.text == "face"
        assert clip.audio is not None
        assert clip.video is not None
        assert (len(clip.audio), clip.video.shape) == (16_000, (25, 96, 96))
        named = capsys.readouterr().err
        assert "wall.mkv: no face" in named
        assert "broken.mkv" in named
        assert "wall.mkv: no audio: the file holds no audio track" in named


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_recipes_run_one_after_the_other(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    write_states(tmp_path / "train" / "0.safetensors", [text for text in ("a fox", "no", "one two") for _ in range(4)])
    write_states(tmp_path / "dev" / "0.safetensors", ["two", "a dog"])
    own = {f"model.init_args.config.{name}": value for name, value in parts.items()}
    own |= {f"data.init_args.{name}": str(tmp_path / name) for name in ("train", "dev")}
    own |= {"trainer.max_steps": "2", "trainer.val_check_interval": "2", "trainer.enable_progress_bar": "false"}
    own |= {"trainer.callbacks.init_args.every_n_train_steps": "2", "model.init_args.optim.warmup_steps": "1"}
    own |= {
        "model.init_args.config.projector_hidden_size": "16",
        "data.init_args.max_frames": "60",
        "trainer.accelerator": "cpu",
    }

    def fit(name: str, recipes: list[str], more: dict[str, str]) -> Path:
        options = own | {"trainer.default_root_dir": str(tmp_path / name)} | more
        configs = [f"--config={RECIPE / recipe}.yaml" for recipe in recipes]
        assert main(["fit", *configs, *(f"--{key}={value}" for key, value in options.items())]) == 0
        (last,) = (tmp_path / name).rglob("last.ckpt")
        return last

    first = fit("recognizer", ["tiny", "recognizer"], {})
    start = {"model.init_args.start_from": str(first)}
    many = fit("many", ["tiny"], start | {"model.init_args.config.strategy": "MSS"})
    fit(
        "one",
        ["tiny"],
        start | {"model.init_args.config.audio_rates": "[16]", "model.init_args.config.video_rates": "[5]"},
    )
    first.unlink()
    assert main(["convert", "mtsk", str(many), str(tmp_path / "model")]) == 0
    model = LlamaMtsk.from_pretrained(tmp_path / "model")
    assert [str(rates) for rates in model.config.scales][:4] == ["(4, 2)", "(16, 2)", "(4, 5)", "(16, 5)"]
    assert model.config.lora.strategy == "MSS"
    (said,) = model.transcribe([torch.rand(8_000) - 0.5], None, rates=Rates(16, 0))
    assert said.usage.used == 2


def test_speakers_are_held_out_for_development(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = [("a", "books"), ("b", "books"), ("c", "books"), ("a", "books"), ("d", "tales"), ("e", "tales")]
    rows = [
        {"audio_filepath": f"{i}.flac", "duration": 1.0, "speaker": speaker, "source": source, "split": split}
        for split in ("train", "dev")
        for i, (speaker, source) in enumerate(speakers)
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = ("--source", "books", "--every", 2, "--speakers", "e")
    run(monkeypatch, "hold_out", tmp_path / "manifest.jsonl", tmp_path / "held.jsonl", *held)
    found = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert [row["speaker"] for row in found if row["split"] == "train"] == ["b", "d"]
    assert [{**row, "split": ""} for row in found] == [{**row, "split": ""} for row in rows]
    run(monkeypatch, "hold_out", tmp_path / "manifest.jsonl", tmp_path / "one.jsonl", "--speakers", "e")
    assert sum(json.loads(line)["split"] == "train" for line in (tmp_path / "one.jsonl").read_text().splitlines()) == 5
    wrong: list[tuple[object, ...]] = [("--speakers", "f"), ("--source", "plays"), ("--source", "books", "--every", 0)]
    for out, options in [(tmp_path / "x.jsonl", some) for some in wrong] + [(tmp_path / "elsewhere" / "x.jsonl", ())]:
        with pytest.raises(SystemExit):
            run(monkeypatch, "hold_out", tmp_path / "manifest.jsonl", out, *options)
