"""The published checkpoint's layout to ours: every tensor arrives, and what is not VQToken is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from tests.tokenizers.vqtoken.published import PATCHES, WIDTH, WORDS, attention, language_model, tensors, write
from tokenthrift import cli
from tokenthrift.budget import BudgetError
from tokenthrift.sources import SourceError
from tokenthrift.vqtoken import VQToken
from tokenthrift.vqtoken.video_lm.chat import VideoChat, unpooled


def frames(count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return tensors(language_model(), attention())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, published: dict[str, Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write(folder / "published", published, shards=3)
    assert cli.main(["convert", "vqtoken", str(folder / "published"), str(folder / "ours")]) == 0
    return folder / "ours"


def test_there_are_twenty_tensors_of_attention(published: dict[str, Tensor]) -> None:
    assert sum(name.startswith("model.cross_attention.") for name in published) == 20


def test_every_tensor_arrives(converted: Path) -> None:
    original = language_model()
    model, loading = LlavaOnevisionForConditionalGeneration.from_pretrained(converted / "vlm", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name][: len(tensor)], tensor), name
    assert model.config.vision_config.to_dict() | {"dtype": None} == original.config.vision_config.to_dict() | {
        "dtype": None
    }
    reducer = VQToken.from_pretrained(converted)
    assert reducer.config.compat == "released"
    assert reducer.config.attention is not None
    assert (reducer.config.attention.hidden_size, reducer.config.attention.num_patches) == (WIDTH, PATCHES)
    for name, tensor in attention().state_dict().items():
        stored = reducer.state_dict()[f"cross_attention.{name}"]
        torch.testing.assert_close(stored, tensor, rtol=1e-3, atol=1e-6)


def test_placeholders_are_numbers_that_no_word_has(converted: Path) -> None:
    chat = VideoChat.from_pretrained(converted)
    ids = {chat.model.config.image_token_id, chat.model.config.video_token_id}
    assert ids == {WORDS, WORDS + 1}
    assert chat.model.get_input_embeddings().weight.shape[0] == WORDS + 2


def test_it_clusters_the_patches_before_pooling_and_answers(converted: Path) -> None:
    chat = VideoChat.from_pretrained(converted)
    clip = frames()
    native = chat.encode(clip)
    assert native.shape == (4 * PATCHES + 1, WIDTH)
    model = language_model()
    pixels = (clip.float() / 127.5 - 1)[None]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[-1]
        expected = model.model.multi_modal_projector(hidden).flatten(0, 1)
    torch.testing.assert_close(native[:-1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native[-1], model.model.image_newline.detach())
    answer = chat.answer(clip, "w5 w6 w7", 9, max_new_tokens=4)
    assert answer.usage is not None
    assert (answer.usage.native, answer.usage.used) == (37, 9)
    assert all(word.startswith("w") for word in answer.text.split())
    assert chat.answer(clip, "w5 w6 w7", 9, max_new_tokens=4) == answer
    assert chat.answer(None, "w5 w6 w7", max_new_tokens=4).usage is None
    first = answer.text.split()[0]
    assert chat.answer(clip, "w5 w6 w7", 9, max_new_tokens=4, stop=(first,)).text == ""
    rated = chat.answer(clip, "w5", "4/s", seconds=2.0, max_new_tokens=1)
    assert rated.usage is not None
    assert rated.usage.used == 8
    with pytest.raises(BudgetError, match="seconds"):
        chat.answer(clip, "w5", "4/s")
    with pytest.raises(ValueError, match="at least one token a frame"):
        chat.answer(clip, "w5", 4)
    with pytest.raises(ValueError, match="uint8 frames"):
        chat.answer(clip[..., :8], "w5")


def test_without_published_attention_the_pooled_tokens_are_reduced(tmp_path: Path, converted: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path)
    VideoChat.from_pretrained(converted).tokenizer.save_pretrained(tmp_path)
    chat = VideoChat.from_pretrained(tmp_path)
    assert chat.grid(4) == (4, 2, 2)
    assert chat.encode(frames()).shape == (17, WIDTH)
    answer = chat.answer(frames(), "w5 w6", 5, max_new_tokens=2)
    assert answer.usage is not None
    assert (answer.usage.native, answer.usage.used) == (17, 5)
    VQToken().save_pretrained(tmp_path / "alone")
    with pytest.raises(SourceError, match="without a language model"):
        VideoChat.from_pretrained(tmp_path / "alone")


def test_pooling_comes_back_after_an_exception() -> None:
    model = language_model()
    with unpooled(model):
        assert model.model.apply_pooling(torch.ones(1, 9, 2)).shape == (1, 9, 2)
        with pytest.raises(RuntimeError, match="already"), unpooled(model):
            pytest.fail("taken out twice")
    with pytest.raises(RuntimeError, match="of the caller"), unpooled(model):
        raise RuntimeError("of the caller")
    assert model.model.apply_pooling(torch.ones(1, 9, 2)).shape == (1, 4, 2)
    assert "apply_pooling" not in vars(model.model)


@pytest.mark.parametrize("pickled", [False, True])
def test_one_file_or_a_pickle_gives_the_same(
    pickled: bool, tmp_path: Path, published: dict[str, Tensor], converted: Path
) -> None:
    source = write(tmp_path / "published", published, pickled=pickled)
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 0
    for name in ("model.safetensors", "config.json", "vlm/model.safetensors", "vlm/tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (converted / name).read_bytes()


def drop(prefix: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]

    return change


def add(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.cross_attention."), "no VQ-attention.*LLaVA-OneVision and no VQToken"),
        (drop("model.cross_attention.transformer_decoder.layers.0.norm2"), r"norm2\.weight is missing"),
        (add("model.cross_attention.more"), "more is unknown"),
        (drop("model.vision_tower."), "patch_embedding.weight is missing"),
        (drop("model.mm_projector.2.bias"), "linear_2.bias is missing"),
        (add("model.vision_resampler.weight"), "no known part: model.vision_resampler.weight"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), r"is \[3\] and should be \[32\]"),
    ],
)
def test_what_is_not_the_checkpoint_is_refused(
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    tmp_path: Path,
    published: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = dict(published)
    change(state)
    source = write(tmp_path / "published", state)
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 1
    assert not (tmp_path / "ours").exists()
    assert re.search(message, capsys.readouterr().err)


def test_parts_that_nothing_reads_do_not_matter(tmp_path: Path, published: dict[str, Tensor]) -> None:
    tower = "model.vision_tower.vision_tower.vision_model"
    state = published | {f"{tower}.head.probe": torch.zeros(1), f"{tower}.embeddings.position_ids": torch.zeros(1, 9)}
    source = write(tmp_path / "published", state)
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 0


def test_files_that_are_missing_are_named(
    tmp_path: Path, published: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "published", published, shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 1
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err
    for path in source.glob("model*"):
        path.unlink()
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 1
    assert "neither model.safetensors nor pytorch_model.bin" in capsys.readouterr().err
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    assert cli.main(["convert", "vqtoken", str(source), str(tmp_path / "ours")]) == 1
    assert "llava_qwen" in capsys.readouterr().err
