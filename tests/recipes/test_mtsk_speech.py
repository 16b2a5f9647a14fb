"""The recipes of real speech: states, starts from Whisper, training steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.asr.tiny_dllm import speech
from tests.recipes.mtsk_speech import RATES, SILENCE, SIZES, TEXTS, decoder, losses_of, start
from tests.recipes.test_mtsk_recipes import RECIPE, run, script
from tokenthrift.cli import main
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.sequence import IGNORED, PROMPTS
from tokenthrift.mtsk.training.clips import Batch, CachedStates, open_passes
from tokenthrift.reducers.pooling import pool_by_rate


@pytest.fixture(scope="module")
def model(parts: Path) -> LlamaMtsk:
    """The start."""
    return LlamaMtsk.from_pretrained(parts / "start/start")


def test_states_have_no_pictures_and_leave_long_recordings_out(parts: Path) -> None:
    shards = sorted((parts / "states" / "train").glob("*.safetensors"))
    assert [shard.name for shard in shards] == ["00-000.safetensors", "01-000.safetensors"]
    data = CachedStates(shards)
    assert data.texts == [*TEXTS, *TEXTS]
    assert data[0].video is None
    assert CachedStates([parts / "states/dev/00-000.safetensors"]).texts == [TEXTS[0]]


def test_synthetic_speech_follows_in_each_pass(parts: Path, tmp_path: Path) -> None:
    clips = [(speech(seconds, 9).numpy() * 20_000).astype(np.int16) for seconds in (1.0, 0.5, 2.0, 31.0)]
    kinds = (("one", "train"), ("two", "dev"), ("three", "train"), ("longer than a pass", "train"))
    said = [{"text": text, "split": split} for text, split in kinds]
    (tmp_path / "synthetic").mkdir()
    offset = np.cumsum([0, *map(len, clips)])
    np.savez(tmp_path / "synthetic/0000-slt.npz", audio=np.concatenate(clips), offset=offset, rows=json.dumps(said))
    own = ("--whisper", parts / "whisper", "--synthetic", tmp_path / "synthetic")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "speech_states", parts / "manifest.jsonl", tmp_path, *own, "--passes", 1, 0)
    train, clean, dev = open_passes(tmp_path)
    assert clean.texts == [*TEXTS, "one", "three"]
    assert train.texts == [*clean.texts, *clean.texts]
    assert dev.texts == [TEXTS[0]]
    audio = [clip.audio for clip in map(clean.__getitem__, (4, 5))]
    assert [len(states) for states in audio if states is not None] == [50, 100]


def test_noisy_recordings_are_played_at_other_speeds_and_read_with_silence(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--whisper", parts / "whisper", "--passes", 0, 1, "--speeds", 0.8)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "speech_states", parts / "manifest.jsonl", tmp_path / "slow", *own, *SILENCE)
        run(patch, "speech_states", parts / "manifest.jsonl", tmp_path / "bare", *own)
        for options in ((*own, "--speeds", 0.8), (*own, *SILENCE, "--speeds", 0.9), (*own, *SILENCE, "--speeds", 0)):
            with pytest.raises(SystemExit):
                run(patch, "speech_states", parts / "manifest.jsonl", tmp_path / "slow", *options)
        refused = capsys.readouterr().err
        assert refused.count("was begun with") == 2
        assert refused.count("must be above 0") == 1
    clean, slow, bare = (
        CachedStates([tmp_path / name])[0].audio
        for name in ("slow/train/00-000.safetensors", "slow/train/01-000.safetensors", "bare/train/00-000.safetensors")
    )
    assert clean is not None
    assert slow is not None
    assert bare is not None
    assert (len(clean), len(slow), len(bare)) == (50, 63, 50)
    assert (clean.float() - bare.float()).abs().max() > 1e-2
    whisper = start.Whisper(parts / "whisper", 120)
    with torch.no_grad():
        (expected,), _ = whisper.states(read_audio(parts / "0.flac"), 0.5)
    torch.testing.assert_close(clean.float(), expected, rtol=0.05, atol=0.05)
    tone = torch.sin(torch.arange(29 * 16_000) / 10)
    assert torch.equal(script("speech_states").at_speed(tone, 0.9), tone), "too long for one pass of the encoder"


def test_tokens_may_begin_elsewhere() -> None:
    states, lengths = torch.arange(24.0).view(2, 6, 2), torch.tensor([6, 4])
    found = decoder.later(Batch(["a", "b"], audio=states, audio_lengths=lengths), 3)
    assert found.audio_lengths.tolist() == [9, 7]
    assert torch.equal(found.audio[:, 3:], states)
    assert torch.equal(found.audio[:, :3], states[:, :1].expand(-1, 3, -1))


@pytest.mark.parametrize("rate", RATES)
def test_the_start_reads_means_of_states_as_whisper_does(rate: int, parts: Path, model: LlamaMtsk) -> None:
    whisper, losses = start.Whisper(parts / "whisper", 120), []
    for i, text in enumerate(TEXTS):
        sound, ids = speech(2.0, i), whisper.ids(text)
        with torch.no_grad():
            states, lengths = whisper.states(sound, 0.5)
            memory, counts = pool_by_rate(states, lengths, rate)
            read = torch.tensor([[*whisper.begin, *ids]])
            causal = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool).tril()
            context = whisper.decoder.context(memory, torch.ones(1, int(counts[0]), dtype=torch.bool))
            logits = whisper.decoder.logits(whisper.decoder(read, causal, context)[0])[0, 1:]
            expected = float(F.cross_entropy(logits, torch.tensor([*ids, whisper.end])))
            found = float(model.loss(model.encode([sound]), [model.token_ids(text)], Rates(audio=rate)))
        assert found == pytest.approx(expected, abs=0.15)
        losses.append(expected)
    assert max(losses) - min(losses) > 0.5, "texts differ more than the two models"


def test_decoder_and_projectors_learn_and_a_stopped_run_goes_on(parts: Path, taught: Path) -> None:
    lines = [json.loads(line) for line in (parts / "taught/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["train"] < 0.8 * lines[0]["train"]
    assert all(len(line["dev"]) == len(RATES) for line in lines)
    before = start.Whisper(parts / "whisper", 120).decoder.state_dict()
    after = load_file(taught)
    moved = {name for name in before if not torch.equal(before[name], after[f"decoder.{name}"])}
    assert moved == {name for name in before if "encoder_attn" in name}


def test_the_rest_of_the_decoder_may_learn_too(parts: Path, tmp_path: Path) -> None:
    own = (*SIZES, "--steps", 2, "--every", 2, "--decoder-rate", 1e-3, "--rest-rate", 1e-3)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "speech_decoder", parts / "whisper", parts / "states", tmp_path, *own)
    before = start.Whisper(parts / "whisper", 120).decoder.state_dict()
    after = load_file(tmp_path / "taught.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[f"decoder.{name}"])}
    assert moved == {name for name in before if "embed" not in name}


def test_passes_over_different_recordings_are_refused(parts: Path, tmp_path: Path) -> None:
    for part, name in (("train", "00-000"), ("train", "01-000"), ("dev", "00-000")):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{name}.safetensors").write_bytes(
            (parts / "states" / part / f"{name}.safetensors").read_bytes()
        )
    other = load_file(tmp_path / "train/01-000.safetensors")
    save_file(other, tmp_path / "train/01-000.safetensors", {"texts": json.dumps(TEXTS[::-1])})
    with pytest.MonkeyPatch.context() as patch:
        for message in ("passes over different recordings", "no states of"):
            with pytest.raises(SystemExit, match=message):
                run(patch, "speech_decoder", parts / "whisper", tmp_path, tmp_path / "out", *SIZES)
            (tmp_path / "train/00-000.safetensors").unlink(missing_ok=True)


def test_a_run_is_not_gone_on_with_in_another_way(parts: Path, taught: Path) -> None:
    own = (*SIZES, "--every", 10, "--seed", 5, "--steps", 60)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="was begun with"):
        run(patch, "speech_decoder", parts / "whisper", parts / "states", taught.parent, *own)


def test_a_start_of_what_was_taught_reads_as_it_does(parts: Path, taught: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "speech_start", parts / "whisper", parts / "manifest.jsonl", tmp_path, *SIZES, "--taught", taught)
    model = LlamaMtsk.from_pretrained(tmp_path / "start")
    whisper = start.Whisper(parts / "whisper", 120)
    reader = decoder.Reader(whisper.decoder, RATES, (), 80).eval()
    reader.load_state_dict(load_file(taught))
    for i in range(len(TEXTS)):
        for expected, found in losses_of(whisper, reader, model, model.encode([speech(2.0, i)])):
            assert found == pytest.approx(expected, rel=0.1, abs=0.15)


def test_the_end_of_a_text_is_not_learned_from_whisper(parts: Path) -> None:
    whisper = start.Whisper(parts / "whisper", 120)
    reader = decoder.Reader(whisper.decoder, RATES[:1], (), 80).eval()
    states = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    batch = Batch(list(TEXTS[:2]), audio=states, audio_lengths=torch.tensor([40, 31]))
    read, written = decoder.rows(whisper, batch.texts)
    ends = written[written != IGNORED] == whisper.end
    assert ends.sum() == 2
    with torch.no_grad():
        encoded = decoder.encoded_of(batch)
        own = reader(encoded, read, reader.scales[0])[written != IGNORED].log_softmax(-1)
        (alone,) = decoder.losses(reader, batch, whisper, reader.scales)
        (taught,) = decoder.losses(reader, batch, whisper, reader.scales, own)
        (same,) = decoder.losses(reader, batch, whisper, reader.scales, torch.where(ends[:, None], own.flip(1), own))
        (more,) = decoder.losses(reader, batch, whisper, reader.scales, own.flip(1))
    torch.testing.assert_close(taught, alone)
    torch.testing.assert_close(same, alone)
    assert more > alone + 0.5
    # What is expected is read from every state.
    found = decoder.teacher_scores(reader, batch, whisper)
    again = reader(encoded, read, None)[written != IGNORED].log_softmax(-1)
    torch.testing.assert_close(found, again)
    assert (found - own).abs().max() > 1e-3


def test_the_tokenizer_writes_lower_case_words_and_each_prompt_as_one_token(model: LlamaMtsk) -> None:
    assert [len(model.token_ids(prompt)) for prompt in PROMPTS.values()] == [1, 1, 1]
    assert model.config.decode.suppress_tokens == (model.token_ids("in the")[-1],)
    for text in TEXTS:
        assert model.text_of(model.token_ids(text)) == text


def test_a_whisper_of_many_languages_is_refused(parts: Path, tmp_path: Path) -> None:
    config = json.loads((parts / "whisper/config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((parts / "whisper" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 51_865}))
    with pytest.raises(SystemExit, match="an English Whisper"):
        start.Whisper(tmp_path, 120)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_recipe_goes_on_from_the_start(parts: Path, model: LlamaMtsk, tmp_path: Path) -> None:
    assert model.config.scales == tuple(Rates(audio=rate) for rate in RATES)
    config = "model.init_args.config"
    own: dict[str, object] = {
        f"{config}.language_model": parts / "start/llama",
        f"{config}.whisper": parts / "whisper",
    }
    own |= {f"{config}.projector_hidden_size": 80, "model.init_args.start_from": parts / "start/start"}
    own |= {f"{config}.audio_rates": list(RATES), f"{config}.suppress_tokens": "[\u0120the]"}
    own[f"{config}.trailing_silence"] = 0.5
    own |= {f"data.init_args.{part}": parts / "states" / part for part in ("train", "dev")}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "2", "trainer.default_root_dir": tmp_path}
    own |= {"data.init_args.max_frames": 60, "data.init_args.dev_items": 1}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in ("tiny", "speech")]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0
