"""The paper's fine-tuning on a tiny random LLaVA-OneVision: manifest, labels, rates, every part learns, resuming."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import av
import lightning as L
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from tests import training_runs
from tests.conftest import ROOT
from tests.multimodal.tiny_vlms import IMAGE, PAD, VIDEO, VOCABULARY, build
from tests.processes import in_this_group, together
from tokenthrift.attachment import attach
from tokenthrift.training.optim import OptimConfig
from tokenthrift.vqtoken import LlavaVQTokenModule, VideoConversationsDataModule, VQToken
from tokenthrift.vqtoken.attention import VQAttention
from tokenthrift.vqtoken.video_lm.chat import VideoChat
from tokenthrift.vqtoken.video_lm.data import ConversationBatch, Conversations, read_manifest

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
TURNS = [{"question": "what moves ?", "answer": "a dog"}, {"question": "where to ?", "answer": "left"}]


def write_video(path: Path, frames: int, seed: int) -> None:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in np.random.default_rng(seed).integers(0, 256, (frames, 1, 1, 3), dtype=np.uint8):
            picture = np.ascontiguousarray(np.broadcast_to(shade, (32, 32, 3)))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its processor, videos of which one is broken, and their manifest."""
    out = tmp_path_factory.mktemp("llava")
    texts = "<|im_start|> <|im_end|> system user assistant You are a helpful what moves where to dog left You . ?"
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<image>": IMAGE, "<video>": VIDEO}
    for word in [*texts.split(), "\n", "<unk>"]:
        words.setdefault(word, len(words))
    assert len(words) < VOCABULARY
    raw = Tokenizer(models.WordLevel(words, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>", "<video>", "\n"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    size = {"height": 16, "width": 16}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[16, 16]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    processor.save_pretrained(out / "base")
    build("llava_onevision").save_pretrained(out / "base")
    rows = []
    for number, frames in enumerate((6, 3, 6, 6)):
        write_video(out / f"{number}.mp4", frames, number)
        rows.append({"video": f"{number}.mp4", "turns": TURNS[: 1 + number % 2]})
    (out / "2.mp4").write_bytes(b"this is no video")
    (out / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return out


def data_of(folder: Path, **options: Any) -> VideoConversationsDataModule:
    base, manifest = str(folder / "base"), str(folder / "train.jsonl")
    return VideoConversationsDataModule(manifest, processor=base, num_frames=4, workers=0, **options)


def module_of(folder: Path, **options: Any) -> LlavaVQTokenModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "budget": "6",
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "gradient_checkpointing": False,
    }
    return LlavaVQTokenModule(str(folder / "base"), **{**settings, **options})


def conversations(folder: Path) -> Conversations:
    data = data_of(folder)
    data.setup("fit")
    return data.train


def test_only_answers_are_learnt(folder: Path) -> None:
    items = conversations(folder)
    batch, tokenizer = items[1], items.processor.tokenizer
    ids, labels = batch.inputs["input_ids"][0], batch.labels[0]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    assert tokenizer.decode(labels[labels >= 0]).split() == ["a", "dog", "<|im_end|>", "left", "<|im_end|>"]
    assert batch.inputs["pixel_values_videos"].shape == (1, 3, 3, 16, 16), "a short video gives each frame once"
    assert int((ids == VIDEO).sum()) == 3 * 4 + 1, "pooled patches of each frame, and the newline"
    assert tokenizer.decode(ids).split()[:2] == ["<|im_start|>", "system"]


def test_a_broken_video_gives_way_to_the_next(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = conversations(folder)
    assert torch.equal(items[2].inputs["pixel_values_videos"], items[3].inputs["pixel_values_videos"])
    assert "2.mp4" in caplog.text
    items = Conversations([items.items[2]], items.processor, 4, 1000)
    with pytest.raises(ValueError, match=r"none of 1 videos.*2\.mp4"):
        items[0]


def test_a_conversation_cut_before_its_first_answer_gives_way_to_the_next(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = conversations(folder)
    whole = items[0]
    items.max_length = int((whole.labels[0] >= 0).nonzero()[0])  # 4 frames; number 1 has 3 and 4 tokens fewer
    assert (items[0].labels >= 0).any()
    assert torch.equal(items[0].inputs["input_ids"], items[1].inputs["input_ids"])
    assert "0.mp4: its first answer" in caplog.text
    items.max_length = int((whole.inputs["input_ids"][0] == VIDEO).nonzero()[0]) + 2
    with pytest.raises(ValueError, match="none of 4 videos"):
        items[0]


def videos_of(batches: list[list[ConversationBatch]]) -> list[float]:
    return [item.inputs["pixel_values_videos"].mean().item() for batch in batches for item in batch]


def test_every_epoch_has_all_videos_in_an_order_of_its_own(folder: Path) -> None:
    data = data_of(folder)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = [videos_of(list(loader)) for _ in range(6)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("line", ["{", '{"video": "a.mp4"}', '{"video": "a.mp4", "turns": []}', '{"turns": [{}]}'])
def test_bad_manifests_name_their_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": "b.mp4", "turns": TURNS}) + "\n" + line)
    with pytest.raises(ValueError, match="line 2"):
        read_manifest(tmp_path / "m.jsonl")
    asked = {"question": "a\u2028b", "answer": "c\x85"}
    row = json.dumps({"video": "b.mp4", "turns": [asked]}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert [item.turns for item in read_manifest(tmp_path / "m.jsonl")] == [(("a\u2028b", "c\x85"),)] * 2
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no conversations"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_conversation_is_learnt_and_every_part_gets_a_gradient(folder: Path) -> None:
    module, batch = module_of(folder), conversations(folder)[1]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module.training_step([batch], 0)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert not [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    assert {name.split(".")[2] for name in module.state_dict() if name not in learning} == {"vision_tower"}


@pytest.mark.parametrize("layer", [-2, [-1, -2]])
def test_what_the_features_leave_out_is_frozen(folder: Path, tmp_path: Path, layer: Any) -> None:
    model = build("llava_onevision")
    model.config.vision_feature_layer = layer
    if not isinstance(layer, int):
        model.model.multi_modal_projector = type(model.model.multi_modal_projector)(model.config)
    shutil.copytree(folder / "base", tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    module, batch = module_of(tmp_path), conversations(folder)[0]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.loss([batch]).backward()
    for name, weight in module.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name


def test_rates_of_the_parts(folder: Path) -> None:
    module = module_of(folder)
    module.trainer = L.Trainer(max_steps=100, logger=False, accelerator="cpu", enable_checkpointing=False)
    groups = module.configure_optimizers()["optimizer"].param_groups
    sizes: dict[float, int] = {}
    for group in groups:
        sizes[group["initial_lr"]] = sizes.get(group["initial_lr"], 0) + sum(p.numel() for p in group["params"])
    tower = sum(p.numel() for p in module.model.model.vision_tower.parameters() if p.requires_grad)
    assert sizes[2e-6] == tower
    assert sum(sizes.values()) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = module_of(folder, vision_learning_rate=0.0)
    assert not any(p.requires_grad for p in frozen.model.model.vision_tower.parameters())


def losses_of(
    folder: Path, steps: int, out: Path | None = None, resume: Path | None = None, **options: Any
) -> list[float]:
    module = module_of(folder, optim=OptimConfig(learning_rate=1e-3, warmup_steps=0.03), attention_learning_rate=1e-3)
    notes, _ = training_runs.fit(module, data_of(folder), steps, folder=out, every=2, resume=resume, **options)
    return notes.losses


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole = losses_of(folder, 6, tmp_path)
    assert losses_of(folder, 6, resume=tmp_path / "step=2.ckpt") == whole[2:]


def group_losses(folder: Path, out: Path) -> torch.Tensor:
    """Losses of two epochs in this process of a group, and of the second half after a resume."""
    whole = losses_of(folder, 4, out, **in_this_group())
    rest = losses_of(folder, 4, resume=out / "step=2.ckpt", **in_this_group())
    assert rest == whole[2:]
    return torch.tensor(whole)


def test_two_processes_train_as_one_that_accumulates(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    first, second = together(tmp_path / "meet", group_losses, folder, tmp_path / "two")
    one = torch.tensor(losses_of(folder, 4, accumulate_grad_batches=2))
    # Lightning gives the losses of accumulated batches divided by their number.
    torch.testing.assert_close(torch.stack([first, second], 1).flatten(), one * 2, rtol=1e-3, atol=1e-4)


def test_what_was_trained_is_used_with_attach(folder: Path, tmp_path: Path) -> None:
    module, batch = module_of(folder), conversations(folder)[0]
    gate = module.vqtoken.cross_attention
    assert isinstance(gate, VQAttention)
    torch.nn.init.ones_(gate.gate)
    module.save_pretrained(tmp_path)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "vlm", dtype=torch.float32)
    vqtoken = VQToken.from_pretrained(tmp_path)
    with torch.no_grad(), attach(model, vqtoken, 6) as handle:
        loss = model(**batch.inputs, labels=batch.labels).loss
    assert [usage.used for usage in handle.usage] == [6]
    torch.testing.assert_close(loss, module.loss([batch]).detach())
    again = module_of(folder, vqtoken=str(tmp_path))
    assert torch.equal(again.vqtoken.state_dict()["cross_attention.gate"], gate.gate)
    chat = VideoChat.from_pretrained(tmp_path)  # as the harnesses load it
    assert torch.equal(chat.reducer.state_dict()["cross_attention.gate"], gate.gate)


def test_the_recipe_names_what_there_is() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "vqtoken" / "llava_onevision_0.5b.yaml").read_text())
    for part, kind in (("model", LlavaVQTokenModule), ("data", VideoConversationsDataModule)):
        assert recipe[part]["class_path"] == f"tokenthrift.vqtoken.{kind.__name__}"
        assert set(recipe[part]["init_args"]) == set(inspect.signature(kind).parameters)
    batch = ConversationBatch({"input_ids": torch.zeros(1, 2)}, torch.zeros(1, 2))
    assert batch.to("cpu").labels.shape == (1, 2)
