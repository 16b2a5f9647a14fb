"""What the published forward pass gets wrong: here it is right, and `compat="released"` shows what wrong was.

The corrections of its training are tested with the training.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, released_config, tiny_config, tiny_karl
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.config import ERROR_BINS, KarlConfig, TransformerConfig, named
from tokenthrift.karl.latent.autoencoder import resized
from tokenthrift.karl.latent.conditioning import ErrorBins, ErrorEmbedding, bin_of
from tokenthrift.karl.latent.transformer import Transformer
from tokenthrift.karl.model import Karl

IMAGES = pictures(3)


@torch.no_grad()
def test_every_image_has_its_own_mask_in_every_head() -> None:
    """Masks tiled head by head instead of image by image, as published, are off by percents."""
    torch.manual_seed(0)
    heads, batch, length = 4, 3, 10
    stack = Transformer(TransformerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=heads)).eval()
    for parameter in stack.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.3)
    x = torch.randn(batch, length, 32)
    seen = torch.arange(length) < torch.tensor([3, 10, 6])[:, None]
    alone = torch.cat([stack(x[i : i + 1], seen[i, None, None, None]) for i in range(batch)])
    own = stack(x, seen[:, None, None])
    torch.testing.assert_close(own[seen], alone[seen], rtol=0, atol=1e-5)
    square = seen[:, None] & seen[:, :, None] | torch.eye(length, dtype=torch.bool)
    tiled = square.repeat(heads, 1, 1).view(batch, heads, length, length)
    assert (stack(x, tiled) - alone)[seen].abs().max() > 1e-2


@pytest.mark.parametrize("codes", [None, 32])
@torch.no_grad()
def test_the_wanted_error_acts_from_the_first_step(codes: int | None) -> None:
    features = torch.zeros(3, 8, 4, 6)
    counts, errors = torch.tensor([TOKENS] * 3), torch.tensor([0.01, 0.05, 0.3])
    same = IMAGES[:1].expand(3, -1, -1, -1)
    for config, acts in ((tiny_config(codebook_size=codes), True), (released_config(codebook_size=codes), False)):
        found = tiny_karl(config).encode_latents(same, features, counts, errors)
        spread = (found.tokens - found.tokens[:1]).abs().amax((1, 2))
        assert bool((spread[1:] > 1e-4).all()) is acts


def test_the_wanted_error_takes_any_value() -> None:
    torch.manual_seed(0)
    smooth, bins = ErrorEmbedding(16), ErrorBins(16)
    near = torch.tensor([0.051, 0.059])
    assert not torch.allclose(*smooth(near))
    assert torch.equal(*bins(near))
    ends = smooth(torch.tensor([0.0, ERROR_BINS[0], ERROR_BINS[-1], 5.0]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3])


def test_published_bins() -> None:
    errors = torch.tensor([0.0, 0.005, 0.0051, 0.05, 0.08, 0.38, 0.9])
    assert [ERROR_BINS[i] for i in bin_of(errors)] == [0.005, 0.005, 0.01, 0.05, 0.09, 0.38, 0.38]
    assert len(ERROR_BINS) == 19


@torch.no_grad()
def test_every_cell_of_a_position_table_is_read_and_any_grid_fits() -> None:
    config = tiny_config()
    table = torch.randn(3, 4, 6)
    assert torch.equal(resized(table, (4, 6), config), table)
    assert resized(table, (7, 3), config).shape == (3, 7, 3)
    flat = torch.full((3, 4, 6), 2.0)
    torch.testing.assert_close(resized(flat, (9, 2), config), torch.full((3, 9, 2), 2.0))
    published = named("karl_small", compat="released")
    wide = torch.randn(1, 64, 64)
    assert torch.equal(resized(wide, (16, 16), published), wide[:, ::4, ::4])


@torch.no_grad()
def test_grids_need_not_be_square_nor_have_as_many_cells_as_channels() -> None:
    for model in (tiny_karl(), tiny_karl(tiny_config("vae"))):
        for size in ((16, 24), (8, 32), (24, 4)):
            images = pictures(2, size)
            assert model.decode(model.encode(images, [3, 9]), size).shape == images.shape


@torch.no_grad()
def test_rows_are_positions() -> None:
    model = tiny_karl()
    images = pictures(1)
    features = model.base.encode(images)
    assert torch.equal(model.base.rows(features)[0, 2 * 6 + 5], features[0, :, 2, 5])
    one_hot = F.one_hot(torch.arange(24) % 16, 16).float()[None] * 1e4
    codes = model.base.to_features(one_hot, (4, 6))
    assert torch.equal(model.base.to_targets(codes)[0], torch.arange(24) % 16)


@torch.no_grad()
def test_the_vae_undoes_its_scaling_and_sees_images_in_its_own_range() -> None:
    model, published = (tiny_karl(make("vae")).base for make in (tiny_config, released_config))
    assert isinstance(model, AutoencoderKL)
    published.load_state_dict(model.state_dict())
    latent = torch.randn(1, 8, 4, 6)
    inner = model.decoder(model.post_quant_conv(latent))
    torch.testing.assert_close(model.decode(latent * 0.2325), (inner + 1) / 2)
    torch.testing.assert_close(published.decode(latent * 0.2325), model.decoder(model.post_quant_conv(latent * 0.2325)))
    assert not torch.allclose(model.encode(IMAGES), published.encode(IMAGES))
    torch.testing.assert_close(model.encode((IMAGES + 1) / 2), published.encode(IMAGES))


@torch.no_grad()
def test_halted_tokens_are_not_computed() -> None:
    model = tiny_karl()
    lengths: list[int] = []
    hook = model.decoder.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for budget in (12, 4, 1):
        model.decode(model.encode(IMAGES, budget))
    hook.remove()
    assert lengths == [24 + 12, 24 + 4, 24 + 1]


def test_a_prefix_needs_no_list_of_positions() -> None:
    images = pictures(6)
    for halting, prefix in (("prefix", True), ("subset", False)):
        config: KarlConfig = tiny_config(halting=halting)
        tokens = tiny_karl(config, decisive=True).encode(images, "e0.05")
        gapless = torch.arange(tokens.positions.shape[1]).expand_as(tokens.positions)
        assert torch.equal(tokens.positions[tokens.mask], gapless[tokens.mask]) is prefix


def test_padding_of_any_content_reaches_nothing() -> None:
    model: Karl = tiny_karl()
    features = model.base.encode(IMAGES)
    found = model.encode_latents(IMAGES, features, torch.tensor([3, 12, 6]), torch.tensor([0.05] * 3))
    values = model.quantize(found.tokens, found.mask).values
    expected = model.decode_latents(values, found.mask)
    spoilt = values.masked_fill(~found.mask[..., None], float("nan")).requires_grad_()
    out = model.decode_latents(spoilt, found.mask)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), spoilt)
    assert not gradient.isnan().any()
    assert not gradient[~found.mask].any()
