"""Attached models in other hands: PEFT, accelerate, torch.compile, Trainer, Lightning, GPU kernels, the docs."""

import copy
from pathlib import Path
from typing import Any, cast

import lightning
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from tests.multimodal.tiny_families import build, encode, rows_of, shared
from tests.multimodal.tiny_vlms import generated, logits
from tokenthrift.attachment import FAMILIES as KNOWN
from tokenthrift.attachment import attach
from tokenthrift.reducers import BipartiteMerging, Uniform

FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen3_vl"])


def batch_of(family: str) -> dict[str, Any]:
    inputs = encode(family, rows_of(family)[:1])
    return {**inputs, "labels": inputs["input_ids"].clone()}


@FAMILIES
def test_adapters_of_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(shared(family))
    inputs = encode(family, rows_of(family))
    with attach(model, Uniform(), "50%"):
        expected = logits(model, inputs)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    adapted.eval()
    with attach(adapted, Uniform(), "50%") as handle:
        assert not torch.allclose(logits(adapted, inputs), expected)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted, inputs), expected)
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert generated(adapted, inputs, 2)[0].shape == (3, 2)
    assert handle.usage
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(g is not None and g.abs().sum() > 0 for name, g in trained.items() if "lora_B" in name)


@FAMILIES
def test_hooks_of_device_map(family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build(family), encode(family, rows_of(family))
    with attach(model, Uniform(), "50%"):
        expected = logits(model, inputs)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with attach(model, Uniform(), "50%") as handle:
        assert torch.equal(logits(model, inputs), expected)
        assert generated(model, inputs, 2)[0].shape == (3, 2)
    assert all(2 * u.used <= u.native for u in handle.usage)


@FAMILIES
def test_trainer_while_attached(family: str, tmp_path: Path) -> None:
    model, batch = copy.deepcopy(shared(family)), batch_of(family)
    before = [p.detach().clone() for p in model.parameters()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_steps=2,
        disable_tqdm=True,
    )  # fmt: skip
    with attach(model, BipartiteMerging(), "50%") as handle:
        trainer = transformers.Trainer(model, arguments, train_dataset=[0, 1], data_collator=lambda items: dict(batch))
        loss = trainer.train().training_loss
    assert loss > 0
    assert all(2 * u.used <= u.native for u in handle.usage)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


class Module(lightning.LightningModule):
    """Trains a model that has a reducer attached."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@FAMILIES
def test_lightning_while_attached(family: str, tmp_path: Path) -> None:
    model, batch = copy.deepcopy(shared(family)), batch_of(family)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    before, items = [p.detach().clone() for p in model.parameters()], cast(Any, [0, 1])
    with attach(model, BipartiteMerging(), "50%") as handle:
        trainer.fit(Module(model), DataLoader(items, collate_fn=lambda items: dict(batch)))
    assert trainer.global_step == 2
    assert all(2 * u.used <= u.native for u in handle.usage)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_compiled_with_dynamic_shapes_also_before_attaching() -> None:
    """A graph from before is not used while attached, and one graph serves prompts of other lengths."""
    model, several = build("llava"), [encode("llava", rows_of("llava")[i : i + 1]) for i in (0, 1)]
    with attach(model, Uniform(), "50%"):
        expected = [logits(model, inputs) for inputs in several]
    bare = logits(model, several[0])
    compiled: Any = torch.compile(model, dynamic=True, backend="eager")
    torch.testing.assert_close(logits(compiled, several[0]), bare, rtol=0, atol=1e-5)
    with attach(compiled, Uniform(), "50%"):
        for inputs, reduced in zip(several, expected, strict=True):
            torch.testing.assert_close(logits(compiled, inputs), reduced, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_kernels_that_need_a_gpu(kernel: str) -> None:
    if not torch.cuda.is_available() or (
        kernel == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available()
    ):
        pytest.skip(f"{kernel} needs a GPU (on a processor flex attention is compiled for a minute)")
    model = build("llava").to("cuda", torch.bfloat16)
    model.set_attn_implementation({"text_config": kernel})
    inputs = {
        name: value.cuda().bfloat16() if value.is_floating_point() else value.cuda()
        for name, value in encode("llava", rows_of("llava")).items()
    }
    with attach(model, Uniform(), "50%") as handle:
        assert logits(model, inputs).isfinite().all()
    assert all(u.used == 8 for u in handle.usage)


def test_the_page_on_attach_names_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attach.md").read_text()
    assert [family for family in KNOWN if f"`{family}`" not in page] == []
