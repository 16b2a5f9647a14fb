"""The recipe of real speech: states without pictures, a start from a dLLM-ASR model, a training step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from tests.asr.tiny_dllm import speech, tiny_config, vocabulary
from tests.recipes.test_mtsk_recipes import RECIPE, run
from tokenthrift.cli import main
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.sequence import PROMPTS
from tokenthrift.mtsk.training.clips import CachedStates
from tokenthrift.reducers.pooling import pool_by_rate

TEXTS = ("a hawk brooded on the far corner", "the two men shook hands", "erie is to the north", "that was one night")
RATES = (2, 4)


def recognizer() -> DllmAsr:
    """A random dLLM-ASR model whose decoder can be written as a Llama: 32 + 6 channels, two heads."""
    config = tiny_config("whisper")
    config = replace(config, backbone=replace(config.backbone, num_attention_heads=2, intermediate_size=256))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DllmAsr(config, vocabulary())
        for name, weight in model.backbone.named_parameters():
            if "embed" in name:
                weight.copy_(torch.randn_like(weight))
                weight -= weight.mean(1, keepdim=True)
    return model.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings with a manifest, a start from a recognizer, and the states of two passes."""
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for i in range(6):
        soundfile.write(folder / f"{i}.flac", speech(1.0, i).numpy().astype(np.float32), 16_000)
        seconds = 31.0 if i == 5 else 1.0
        split = "dev" if i == 4 else "train"
        row = {"audio_filepath": f"{i}.flac", "duration": seconds, "text": TEXTS[i % 4], "split": split}
        lines.append(json.dumps(row) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    recognizer().save_pretrained(folder / "recognizer")
    with pytest.MonkeyPatch.context() as patch:
        own = ("--projector", 80, "--rates", *RATES)
        run(patch, "speech_start", folder / "recognizer", folder / "manifest.jsonl", folder / "start", *own)
        for _ in range(2):
            options = ("--whisper", folder / "start/whisper", "--passes", 2)
            run(patch, "speech_states", folder / "manifest.jsonl", folder / "states", *options)
    return folder


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


@pytest.mark.parametrize("rate", RATES)
def test_the_start_reads_means_of_states_as_the_recognizer_does(rate: int, parts: Path, model: LlamaMtsk) -> None:
    source, losses = DllmAsr.from_pretrained(parts / "recognizer"), []
    decoder = source.backbone.decoder
    for i, text in enumerate(TEXTS):
        sound = speech(2.0, i)
        with torch.no_grad():
            memory, counts = pool_by_rate(*source.encode([sound]), rate)
            ids = [i for word in text.split() for i in source.vocabulary.word(word)]
            read = torch.tensor([[source.vocabulary.start_id, *ids]])
            causal = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool).tril()
            context = decoder.context(memory, torch.ones(1, int(counts[0]), dtype=torch.bool))
            logits = decoder.logits(decoder(read, causal, context)[0])[0]
            # The Llama has no MASK, no DELETE and no start to write.
            logits[:, [source.vocabulary.mask_id, source.vocabulary.delete_id, source.vocabulary.start_id]] = -1e9
            expected = F.cross_entropy(logits, torch.tensor([*ids, source.vocabulary.eos_id]))
            losses.append(
                (float(model.loss(model.encode([sound]), [model.token_ids(text)], Rates(audio=rate))), expected)
            )
    for found, wanted in losses:
        assert found == pytest.approx(float(wanted), abs=0.15)
    assert max(found for found, _ in losses) - min(found for found, _ in losses) > 0.2


def test_the_tokenizer_has_the_words_of_the_recognizer_and_a_token_for_each_prompt(model: LlamaMtsk) -> None:
    assert [len(model.token_ids(prompt)) for prompt in PROMPTS.values()] == [1, 1, 1]
    for text in TEXTS:
        assert model.token_ids(text) == [i for word in text.split() for i in vocabulary().word(word)]
        assert model.text_of(model.token_ids(text)) == text


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_recipe_goes_on_from_the_start(parts: Path, model: LlamaMtsk, tmp_path: Path) -> None:
    assert model.config.scales == tuple(Rates(audio=rate) for rate in RATES)
    config = "model.init_args.config"
    own: dict[str, object] = {
        f"{config}.language_model": parts / "start/llama",
        f"{config}.whisper": parts / "start/whisper",
    }
    own |= {f"{config}.projector_hidden_size": 80, "model.init_args.start_from": parts / "start/start"}
    own[f"{config}.audio_rates"] = list(RATES)
    own |= {f"data.init_args.{part}": parts / "states" / part for part in ("train", "dev")}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "2", "trainer.default_root_dir": tmp_path}
    own |= {"data.init_args.max_frames": 60, "data.init_args.dev_items": 1}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in ("tiny", "speech")]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0
