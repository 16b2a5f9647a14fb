"""AV-HuBERT: mouth crops at 25 frames a second to one state a frame.

Source: Shi et al. 2022 (arXiv 2201.02184), as Llama-MTSK (arXiv 2503.06362) uses it: a 3-D convolution, a ResNet-18
over frames, both streams side by side (the audio half zeros), and a pre-norm Transformer. Key names are those of the
public checkpoints, base and large, without fairseq.

Differs from the published code: frames after the end of an item are never read (no mask was passed there, and a padded
frame is mid-gray), so a row of a batch equals the row alone; the ResNet runs over real frames only, so that batch norm
sees no padding when a small encoder is trained; there is no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.lazy import deprecated
from tokenthrift.mtsk.config import VideoConfig
from tokenthrift.padding import length_mask

__all__ = ["AUDIO_FEATURES", "PRETRAINING_KEYS", "AvHubert", "avhubert_config", "avhubert_weights", "normalize"]

AUDIO_FEATURES: Final = 104  # 26 log filter banks of 4 neighboring frames
PRETRAINING_KEYS: Final = ("mask_emb", "label_embs_concat", "final_proj.weight", "final_proj.bias")
_KERNEL, _GROUPS = 128, 16


def normalize(video: Tensor, crop: int = 88, shrink: int = 1) -> Tensor:
    """Mouth crops as the encoder reads them: the middle of each frame, with the mean and deviation of the training set.

    Args:
        video: (T, H, W) gray; uint8, or floating point in [0, 1].
        crop: side of the square that is kept.
        shrink: squares of so many pixels are averaged, for a small encoder.

    Returns:
        (T, crop / shrink, crop / shrink).

    Raises:
        ValueError: another shape, or a frame smaller than the square.
    """
    if video.ndim != 3 or min(video.shape[1:]) < crop:
        raise ValueError(f"video must be (frames, H, W) with H and W from {crop}, got {tuple(video.shape)}")
    top, left = (video.shape[1] - crop) // 2, (video.shape[2] - crop) // 2
    middle = video[:, top : top + crop, left : left + crop]
    gray = middle.float() / 255 if middle.dtype == torch.uint8 else middle
    gray = gray if shrink == 1 else F.avg_pool2d(gray, shrink)
    return (gray - 0.421) / 0.165


class _Block(nn.Module):
    """A basic block of ResNet-18 with a slope per channel."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(out), nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out), nn.PReLU(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or inner != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        rest = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu2(self.bn2(self.conv2(x)) + rest))


class _Trunk(nn.Module):
    """(N, channels[0], H, W) to (N, channels[3])."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        inner = [channels[0], *channels[:3]]
        for i, (before, out) in enumerate(zip(inner, channels, strict=True)):
            stride = 1 if i == 0 else 2
            self.add_module(f"layer{i + 1}", nn.Sequential(_Block(before, out, stride), _Block(out, out, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


class _ResEncoder(nn.Module):
    """(B, T, H, W) frames to (real frames, channels[3]) features, in reading order."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        first = channels[0]
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, first, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(first),
            nn.PReLU(first),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.trunk = _Trunk(channels)

    def forward(self, video: Tensor, valid: Tensor) -> Tensor:
        x: Tensor = self.frontend3D[0](video[:, None])
        frames = x.transpose(1, 2)[valid][:, :, None]
        frames = self.frontend3D[2](self.frontend3D[1](frames))[:, :, 0]
        # The pool of the published front looks at one frame at a time; in two dimensions it is much quicker.
        return cast(Tensor, self.trunk(F.max_pool2d(frames, 3, 2, 1)))


class _VideoFeatures(nn.Module):
    def __init__(self, channels: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.resnet = _ResEncoder(channels)
        self.proj = nn.Linear(channels[-1], hidden_size)


class _AudioFeatures(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(AUDIO_FEATURES, hidden_size)


class _PositionalConv(nn.Module):
    """A grouped convolution over time with normed weights, under the names that fairseq gave them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(1, 1, _KERNEL))
        self.weight_v = nn.Parameter(torch.randn(size, size // _GROUPS, _KERNEL) * (4 / (_KERNEL * size)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        # A last tap of zeros in place of an output to drop. Without it oneDNN 3.12 reads wrong weights in bf16 on AMX,
        # where a group has 2 to 14 channels and kernel times channels is a multiple of 32.
        return F.conv1d(x, F.pad(weight, (0, 1)), self.bias, padding=_KERNEL // 2, groups=_GROUPS)


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for proj in projections)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.out_proj(y.transpose(1, 2).flatten(2)))


class _Layer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.self_attn = _Attention(hidden_size, num_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))


class _Encoder(nn.Module):
    def __init__(self, hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(_PositionalConv(hidden_size))
        self.layers = nn.ModuleList(_Layer(hidden_size, num_heads, intermediate_size) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x * valid[..., None]
        x = x + F.gelu(self.pos_conv(x.transpose(1, 2))).transpose(1, 2)
        mask = None if bool(valid.all()) else valid[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return cast(Tensor, self.layer_norm(x)) * valid[..., None]


class AvHubert(nn.Module):
    """The audio-visual encoder; Llama-MTSK gives it video alone.

    Args:
        hidden_size: width of a state, a multiple of 16 (768 base, 1024 large).
        num_hidden_layers: of the Transformer (12, 24).
        num_attention_heads: of its attention (12, 16).
        intermediate_size: width of its feed-forward (3072, 4096).
        channels: of the four stages of the ResNet.
    """

    def __init__(
        self,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        channels: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        self.feature_extractor_video = _VideoFeatures(channels, hidden_size)
        self.feature_extractor_audio = _AudioFeatures(hidden_size)
        self.layer_norm = nn.LayerNorm(2 * hidden_size)
        self.post_extract_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.encoder = _Encoder(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)

    def forward(self, video: Tensor | None, lengths: Tensor | None = None, audio: Tensor | None = None) -> Tensor:
        """Encodes a padded batch.

        Args:
            video: (B, T, H, W) as `normalize` makes it; what stands after the end of an item is not read. None gives
                zeros for its half.
            lengths: (B,) frames of each item; all of T if not given.
            audio: (B, T, 104) filter banks, or None for zeros.

        Returns:
            (B, T, hidden_size) states, zero after the end of each item.
        """
        given = video if video is not None else audio
        if given is None:
            raise ValueError("give video, audio or both")
        rows, size = given.shape[:2]
        if lengths is None:
            lengths = torch.full((rows,), size, device=given.device)
        valid = length_mask(lengths, size)
        hidden_size = self.post_extract_proj.out_features
        visual = acoustic = given.new_zeros(rows, size, hidden_size)
        if video is not None:
            frames = self.feature_extractor_video.resnet(video.masked_fill(~valid[..., None, None], 0.0), valid)
            features = self.feature_extractor_video.proj(frames)
            visual = visual.to(features.dtype).masked_scatter(valid[..., None], features)
        if audio is not None:
            acoustic = self.feature_extractor_audio.proj(audio)
        features = self.layer_norm(torch.cat([acoustic.to(visual.dtype), visual], 2))
        return cast(Tensor, self.encoder(self.post_extract_proj(features), valid))


def avhubert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of a public checkpoint, pretrained or fine-tuned, without those only pretraining needs."""
    prefix = "encoder.w2v_model."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if key not in PRETRAINING_KEYS}


def avhubert_config(weights: Mapping[str, Tensor]) -> VideoConfig:
    """The sizes of an AV-HuBERT under our names; heads are 64 wide, as in all published ones."""
    hidden_size = len(weights["post_extract_proj.weight"])
    stages = [f"feature_extractor_video.resnet.trunk.layer{i}.0.conv1.weight" for i in (1, 2, 3, 4)]
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
    return VideoConfig(
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=len(weights["encoder.layers.0.fc1.weight"]),
        channels=tuple(len(weights[key]) for key in stages),  # type: ignore[arg-type]
    )


__getattr__ = deprecated(__name__, {"AVHubert": "AvHubert", "normalise": "normalize"})
