"""Encoder, draft and decoder trained together on real speech, and the error rates of the readings."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration

from tests.asr.tiny_dllm import LINES, speech, tiny_model, write_whisper
from tests.recipes.dllm_scripts import RATE, run, script
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.pretrained import assemble

together, teacher, evaluate = script("together"), script("teacher"), script("evaluate")
larger_vocabulary = script("larger_vocabulary")

TEXTS = [line for line in LINES if line.replace(" ", "").isalpha() and line.islower()]


def write_shard(path: Path, clips: list[tuple[float, str, str]]) -> None:
    """Clips of so many seconds, with their text and split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [(speech(seconds, i).numpy() * 20_000).astype(np.int16) for i, (seconds, *_) in enumerate(clips)]
    rows = [{"id": str(i), "text": text, "split": split} for i, (_, text, split) in enumerate(clips)]
    np.savez(
        path, audio=np.concatenate(audio), offset=np.cumsum([0, *map(len, audio)]), rows=np.array(json.dumps(rows))
    )


@pytest.fixture
def training(tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of a training, its steps apart."""
    write_shard(tmp_path / "speech" / "9100-voice.npz", [(3.5, text, "train") for text in TEXTS])
    tiny_model().save_pretrained(tmp_path / "start")
    rates = ("--encoder-rate", 0.002, "--draft-rate", 0.004, "--decoder-rate", 0.004)
    options = ("--start", tmp_path / "start", "--seconds", 20, "--distance-every", 2, *rates)
    return tmp_path / "speech", tmp_path / "out", *options


def shown(capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    """The losses of every line."""
    lines = [line.split(" | ")[1:-1] for line in capsys.readouterr().out.splitlines()]
    return [{name: float(value) for name, value in (cell.split() for cell in line)} for line in lines]


def test_all_parts_learn_but_the_frozen_layers(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(together, "WARMUP", 1)
    run(monkeypatch, together, *training, "--steps", 60)
    first, *_, last = shown(capsys)
    assert set(first) == {"ctc", "causal", "denoising", "distance"}
    assert all(last[name] < 0.95 * first[name] for name in ("ctc", "causal", "denoising"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name].half(), after[name])}
    lowest = {name for name in before if name.startswith(("encoder.conv", "encoder.layers.0."))}
    assert lowest
    assert same == lowest, "only the convolutions and the lowest layer stay"
    assert DllmAsr.from_pretrained(tmp_path / "out").transcribe([speech(1.0)])
    with pytest.raises(SystemExit):  # the schedule of a run is that of its options
        run(monkeypatch, together, *training, "--steps", 80)
    assert "was begun with" in capsys.readouterr().err


def test_the_denoising_loss_may_come_every_few_steps(
    training: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    whole = together.losses

    def spy(*given: Any) -> Any:
        out = whole(*given)
        seen.append(set(out))
        return out

    monkeypatch.setattr(together, "losses", spy)
    run(monkeypatch, together, *training, "--denoise-every", 3, "--steps", 5)
    assert [("denoising" in names) for names in seen] == [True, False, False, True, False]
    assert all({"ctc", "causal"} <= names for names in seen)


def test_a_stopped_training_ends_as_one_that_went_through(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, *options = training
    run(monkeypatch, together, folder, out, *options, "--steps", 4)
    monkeypatch.setattr(together, "SAVE_SECONDS", -1.0)  # before every step
    whole = together.batches

    def stops(*given: Any, **named: Any) -> Iterator[Any]:
        yield from itertools.islice(whole(*given, **named), 2)
        raise KeyboardInterrupt

    again = (folder, tmp_path / "again", *options, "--steps", 4)
    with monkeypatch.context() as patch:
        patch.setattr(together, "batches", stops)
        with pytest.raises(KeyboardInterrupt):
            run(patch, together, *again)
    run(monkeypatch, together, *again)
    through, stopped = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert all(torch.equal(through[name], stopped[name]) for name in through)


def test_the_decoder_may_be_that_of_whisper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "speech" / "9100-voice.npz", [(3.5, text, "train") for text in TEXTS])
    whisper = write_whisper(tmp_path / "whisper")
    adapter = AdapterConfig(pool=2, stride=1)
    start = assemble(str(whisper), None, vocab_size=120, max_position_embeddings=128, adapter=adapter)
    state = start.backbone.state_dict()
    expected = {name: weight.clone() for name, weight in state.items() if name.startswith("decoder.")}
    with torch.no_grad():
        for parameter in start.backbone.parameters():
            parameter.zero_()
    start.save_pretrained(tmp_path / "start")
    arguments = (tmp_path / "speech", tmp_path / "out", "--start", tmp_path / "start", "--seconds", 20)
    still = ("--encoder-rate", 0, "--draft-rate", 0, "--decoder-rate", 0)
    run(monkeypatch, together, *arguments, *still, "--whisper", whisper, "--steps", 1)
    found = DllmAsr.from_pretrained(tmp_path / "out").backbone.state_dict()
    assert all(torch.allclose(found[name].float(), weight, atol=1e-3) for name, weight in expected.items())
    larger = Path(shutil.copytree(whisper, tmp_path / "larger"))
    sizes = json.loads((whisper / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(sizes | {"decoder_layers": sizes["decoder_layers"] + 1}))
    with pytest.raises(SystemExit):
        run(monkeypatch, together, *arguments, "--whisper", larger, "--steps", 1)
    assert f"has decoder_layers {sizes['decoder_layers'] + 1}, the model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="of 160 positions cannot have 512"):
        assemble(str(whisper), None, vocab_size=120, max_position_embeddings=512, adapter=adapter)
    tiny_model().save_pretrained(tmp_path / "start")
    data = json.loads((tmp_path / "start" / "tokenizer.json").read_text())
    pair = data["model"]["merges"].pop()
    data["model"]["vocab"]["zzz"] = data["model"]["vocab"].pop(
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "")
    )
    (tmp_path / "start" / "tokenizer.json").write_text(json.dumps(data))
    for option in ("--whisper", "--teacher"):
        with pytest.raises(SystemExit):
            run(monkeypatch, together, *arguments, option, whisper, "--steps", 1)
        assert "lacks the token 'zzz'" in capsys.readouterr().err


def test_the_decoder_learns_what_a_teacher_expects(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whisper = write_whisper(tmp_path / "whisper")
    adapter = AdapterConfig(pool=2, stride=1)
    start = assemble(str(whisper), None, vocab_size=120, max_position_embeddings=128, adapter=adapter)
    with torch.no_grad():
        for weight in decoder_of(start).layers.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    start.save_pretrained(tmp_path / "start")
    alone = (f"--{name}-weight=0" for name in ("ctc", "causal", "denoising", "distance"))
    run(monkeypatch, together, *training, *alone, "--teacher", whisper, "--steps", 60)
    first, *_, last = shown(capsys)
    assert last["teacher"] < 0.5 * first["teacher"]


def test_of_the_end_of_a_text_nothing_is_learned_from_a_teacher() -> None:
    scores, expected = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()
    targets, expected = torch.tensor([1, 5, 2, 5]), expected.log_softmax(-1)
    apart = F.kl_div(scores.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1)
    assert teacher.divergence(scores, targets, expected, 5) == pytest.approx(float(apart[[0, 2]].mean()), rel=1e-5)


def test_a_teacher_expects_what_whisper_does(tmp_path: Path) -> None:
    """The scores of transformers, over the tokens of the vocabulary, behind both start tokens."""
    whisper = write_whisper(tmp_path / "whisper")
    adapter = AdapterConfig(pool=2, stride=1)
    model = assemble(str(whisper), None, vocab_size=60, max_position_embeddings=128, adapter=adapter)
    published = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    vocabulary, whole = model.vocabulary, Tokenizer.from_file(str(whisper / "tokenizer.json"))
    recordings, texts = [speech(2.0, i) for i in range(2)], together.token_ids(model, TEXTS[:2])
    found = teacher.Teacher(str(whisper), vocabulary, 128)(recordings, texts)
    kept = [*vocabulary.source_ids(whole), whole.token_to_id("<|endoftext|>")]
    start, rows = [whole.token_to_id(name) for name in teacher.START], []
    for audio, text in zip(recordings, texts, strict=True):
        states, _ = model.encode([audio])
        ids = torch.tensor([[*start, *(kept[i] for i in text)]])
        with torch.no_grad():
            hidden = published.model.decoder(ids, encoder_hidden_states=states).last_hidden_state[0, 1:]
            rows.append(published.proj_out(hidden)[:, kept].log_softmax(-1))
    columns = [*range(len(kept) - 1), vocabulary.eos_id]
    torch.testing.assert_close(found[:, columns], torch.cat(rows), atol=1e-4, rtol=1e-4)
    assert (found.exp().sum(-1) - 1).abs().max() < 1e-4


def test_a_larger_vocabulary_keeps_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of tokens that the model has stay, the others are Whisper's; what follows a text of old tokens too."""
    write_shard(tmp_path / "speech" / "9100-voice.npz", [(3.5, text, "train") for text in TEXTS])
    whisper = write_whisper(tmp_path / "whisper")
    start = assemble(
        str(whisper), None, vocab_size=60, max_position_embeddings=128, adapter=AdapterConfig(pool=2, stride=1)
    )
    with torch.no_grad():
        decoder_of(start).embed_tokens.weight.add_(0.5)
    start.save_pretrained(tmp_path / "start")
    sentences = tmp_path / "sentences.jsonl"
    sentences.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    options = ("--size", 100, "--whisper", whisper, "--sentences", sentences)
    run(monkeypatch, larger_vocabulary, tmp_path / "start", tmp_path / "out", "--speech", tmp_path / "speech", *options)
    before, now = (float(part.split()[0]) for part in capsys.readouterr().out.split(": ")[1].split(", "))
    assert 1 <= now < before
    grown = DllmAsr.from_pretrained(tmp_path / "out").float()
    assert grown.vocabulary.size > start.vocabulary.size
    published = load_file(whisper / "model.safetensors")["model.decoder.embed_tokens.weight"].half().float()
    own, old = (decoder_of(model).embed_tokens.weight for model in (grown, start))
    tokens, whole = start.vocabulary.tokenizer.get_vocab(), json.loads((whisper / "tokenizer.json").read_text())
    for token, i in grown.vocabulary.tokenizer.get_vocab().items():
        expected = old[tokens[token]] if token in tokens else published[whole["model"]["vocab"][token]]
        assert torch.allclose(own[i], expected, atol=1e-3), token
    same = [name for name in start.state_dict() if "embed_tokens" not in name]
    assert all(torch.allclose(grown.state_dict()[name], start.state_dict()[name], atol=1e-3) for name in same)

    with torch.no_grad():
        for parameter in (*start.encoder.parameters(), *decoder_of(start).layers.parameters()):
            parameter.add_(0.25)
    words = {word: 1 for text in TEXTS for word in text.split()}
    mixed = larger_vocabulary.larger(start, str(whisper), 100, Counter(words), 0.5)
    theirs = assemble(
        str(whisper),
        None,
        vocab_size=100,
        max_position_embeddings=128,
        adapter=AdapterConfig(pool=2, stride=1),
        words=words,
    )
    for name in ("encoder.layers.0.fc1.weight", "backbone.decoder.layers.1.fc2.weight"):
        middle = 0.5 * (start.state_dict()[name] + theirs.state_dict()[name])
        assert torch.allclose(mixed.state_dict()[name], middle, atol=1e-6)
    untouched = next(name for name in start.state_dict() if name.startswith("draft."))
    assert torch.equal(mixed.state_dict()[untouched], start.state_dict()[untouched])


def test_a_training_without_speech_is_refused(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run(monkeypatch, together, tmp_path / "empty", *training[1:])
    assert "holds no shards" in capsys.readouterr().err


def test_batches_hold_training_clips_of_like_length_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    clips = [(2.5 + 0.5 * (i % 8), f"text {i}", "dev" if i == 3 else "train") for i in range(24)]
    write_shard(tmp_path / "9100-voice.npz", [*clips, (21.0, "too long", "train")])
    write_shard(tmp_path / "9000-prompts.npz", [(4.0, "prompt", "train")])
    shards = sorted(tmp_path.glob("*.npz"))

    def taken(start: int, count: int) -> list[list[str]]:
        feed = together.batches(shards, [], [], seconds=20, together=2, repeats=2, start=start)
        made = list(itertools.islice(feed, count))
        for rows, clean, _ in made:
            assert [text for _, text in clean] == [text for _, text in rows]
            lengths = [len(audio) / RATE for audio, _ in rows]
            assert max(lengths) * len(rows) <= 20 * 1.4
        return [[text for _, text in rows] for rows, _, _ in made]

    through = taken(0, 12)
    assert taken(5, 7) == through[5:]
    epoch = list(itertools.accumulate(through, lambda seen, rows: seen + rows))
    whole = next(texts for texts in epoch if sum(texts.count(f"text {i}") for i in range(24)) >= 23)
    spoken = [text for text in whole if text.startswith("text")]
    assert sorted(spoken) == sorted(text for _, text, split in clips if split == "train"), "once an epoch"
    assert whole.count("prompt") <= 2
    assert not {"text 3", "too long"} & set(whole)


def test_clips_of_very_short_ones_are_joined(tmp_path: Path) -> None:
    audio = [(torch.ones(RATE, dtype=torch.int16), str(i)) for i in range(20)]
    joined = together.utterances(tmp_path, audio, random.Random(0))
    assert sorted(" ".join(text for _, text in joined).split()) == sorted(text for _, text in audio)
    assert len(joined) < 20
    apart = [(torch.ones(4 * RATE, dtype=torch.int16), "a")] * 3
    assert [text for _, text in together.utterances(tmp_path, apart, random.Random(0))] == ["a"] * 3


def test_parts_of_the_spectrogram_are_hidden() -> None:
    mels = torch.randn(3, 80, 200)
    frames = torch.tensor([200, 120, 2])
    hidden = together.hide(mels, frames, random.Random(1))
    changed = hidden != mels
    assert 0.02 < changed[:2].float().mean() < 0.5
    for row, before, length in zip(hidden, mels, frames.tolist(), strict=True):
        assert torch.all((row == before) | (row == before[:, :length].mean()))


def test_error_rates_are_shown_by_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(draft="confident", max_rounds=2).save_pretrained(tmp_path / "model")
    data = tmp_path / "voices"
    data.mkdir()
    rows = []
    for i, source in enumerate(["one", "two", "two"]):
        soundfile.write(data / f"{i}.flac", speech(1.0 + 0.1 * i, i).numpy(), RATE)
        rows.append(json.dumps({"audio_filepath": f"{i}.flac", "text": TEXTS[0], "source": source}))
    (data / "manifest.jsonl").write_text("\n".join(rows))
    run(monkeypatch, evaluate, tmp_path / "model", data, "--certify", "ctc", "--json", tmp_path / "texts.jsonl")
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in shown if not line.startswith("certified: ")]
    assert shown[1].startswith("certified: 3 of 3 texts are the left-to-right ones")
    assert [line.split(" clips")[0] for line in lines] == ["voices: 3", "one: 1", "two: 2"]
    assert all(f"{name} " in line for line in lines for name in ("draft", "left to right", "denoised", "certified"))
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    model = DllmAsr.from_pretrained(tmp_path / "model")
    for row in texts:
        audio, _ = soundfile.read(data / row["audio_filepath"], dtype="float32")
        assert row["denoised"] == model.transcribe([torch.from_numpy(audio)])[0].text
    run(monkeypatch, evaluate, tmp_path / "model", data, "--certify", "ctc", "--precision", "int8")
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert shown[1].startswith("certified: 3 of 3 texts are the left-to-right ones")
