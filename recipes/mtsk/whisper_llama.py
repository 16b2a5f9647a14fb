"""A decoder of Whisper's kind as a Llama that reads sound tokens in its prefix, with (nearly) the same outputs.

Some hours of speech are too few to teach a small language model what a sound token is. Whisper's decoder knows it, but
looks at sound by cross-attention, which Llama-MTSK (arXiv 2503.06362) has not: its language model reads sound tokens
before the text. Here the weights of such a decoder are written down as those of a Llama. No step of training is needed,
and the result is a checkpoint that transformers loads as any other Llama:

    A Whisper layer becomes two: one whose text looks at text alone, and one whose text looks at sound alone. Which is
    which, flags in six more channels of the hidden states tell; keys that a query must not see get a low score.
    Sound tokens look at one fixed token whose value is zero, and their feed-forward is gated off, so each layer hands
    them on as they came.
    LayerNorm is RMSNorm where means are zero: what is written is centered, and what is read is centered in the
    weights. Gains and biases move into the projection that follows.
    Rotary positions are slowed down until they turn nothing. The learned positions of Whisper come from the first
    layer: it counts the text so far by attention, and its feed-forward is a table.

What is not exact: the norms see the flags and the mean of an embedding, less than 1 % each; the bias of the last norm
is scaled by the norm of the hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["BALLAST", "EXTRA", "SINK", "llama_of", "part", "prefix_row", "text_row"]

EXTRA: Final = 6
"""Channels after those of Whisper: sound, text, sink, first token of a text, count, bias of the last norm."""
SOUND, TEXT, SINK_FLAG, FIRST, COUNT, BIAS = range(EXTRA)
BALLAST: Final = 300.0
"""Of a sound token in the channel `SOUND`: large beside its state, so that the norms of all are alike."""
SINK: Final = (BALLAST, 0.0, BALLAST / 4, 0.0, 0.0, -0.06)
"""The flags of the token at which sound looks. All its other channels are zero, and no text sees it."""
FLAG = 0.05  # of the norm of an embedding
QUERY = 32.0  # what every query has in the channel of masks
HIDDEN = 1500.0  # how far below others a key is that must not be seen
SPARE = 8  # units of the feed-forward besides those of Whisper
BIAS_SCALE = 0.002
EPS = 1e-5


def text_row(row: Tensor, bias: float, flag: float, *, first: bool = False) -> Tensor:
    """The embedding of a token of text, (D + EXTRA,).

    Args:
        row: (D,) that of Whisper.
        bias: what the last norm's bias adds to its score.
        flag: small beside a row.
        first: it starts the text: positions are counted from it.
    """
    flags = torch.zeros(EXTRA)
    flags[TEXT], flags[BIAS], flags[FIRST] = flag, bias * BIAS_SCALE, flag * first
    return torch.cat([row, flags])


def prefix_row(size: int) -> Tensor:
    """(size + EXTRA,): the embedding of a token that nothing but sound looks at, and which stays as it is."""
    return torch.cat([torch.zeros(size), torch.tensor(SINK)])


class Norm:
    """A norm of Whisper's that moves into the projection behind it; without weights, plain scaling."""

    def __init__(self, scale: float, state: Mapping[str, Tensor] | None = None) -> None:
        self.scale, self.state = scale, state

    def before(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The projection (O, D) and its bias (O,) that read what a Llama's norm gives."""
        own = torch.zeros(len(weight)) if bias is None else bias
        if self.state is None:
            return weight * self.scale, own
        read = weight * self.state["weight"]
        return (read - read.mean(1, keepdim=True)) * self.scale, own + weight @ self.state["bias"]


class _Layer:
    """The tensors of one Llama layer, zero at first, and how a Whisper layer is written into them."""

    def __init__(self, size: int, heads: int, width: int, audio_rms: float) -> None:
        self.size, self.heads, self.head = size, heads, size // heads
        self.hidden, self.width, self.audio_rms = size + EXTRA, width, audio_rms
        inner = heads * (self.head + 2)
        self.tensors = {
            **{f"self_attn.{n}_proj.weight": torch.zeros(inner, self.hidden) for n in "qkv"},
            **{f"self_attn.{n}_proj.bias": torch.zeros(inner) for n in "qkv"},
            "self_attn.o_proj.weight": torch.zeros(self.hidden, inner),
            "self_attn.o_proj.bias": torch.zeros(self.hidden),
            "mlp.gate_proj.weight": torch.zeros(width, self.hidden),
            "mlp.gate_proj.bias": torch.zeros(width),
            "mlp.up_proj.weight": torch.zeros(width, self.hidden),
            "mlp.up_proj.bias": torch.ones(width),
            "mlp.down_proj.weight": torch.zeros(self.hidden, width),
            "mlp.down_proj.bias": torch.zeros(self.hidden),
            "input_layernorm.weight": torch.ones(self.hidden),
            "post_attention_layernorm.weight": torch.ones(self.hidden),
        }
        self.sink = BALLAST / 4 / _rms(prefix_row(size))
        # A sound token gates every unit off, whatever else it holds.
        self.tensors["mlp.gate_proj.weight"][:, size + SOUND] = -HIDDEN / self.sound
        self._attend()

    @property
    def sound(self) -> float:
        """What a norm makes of the ballast of a sound token."""
        return BALLAST / self.audio_rms

    def rows(self, name: str) -> Tensor:
        """(heads, head + 2, H) of a projection of the attention; the last two channels are those of masks."""
        return self.tensors[f"self_attn.{name}_proj.weight"].view(self.heads, self.head + 2, -1)

    def bias(self, name: str) -> Tensor:
        """(heads, head + 2)."""
        return self.tensors[f"self_attn.{name}_proj.bias"].view(self.heads, self.head + 2)

    def _attend(self) -> None:
        scale = math.sqrt(self.head + 2)  # by which scores are divided
        self.bias("q")[:, -2] = QUERY
        # Sound, and the sink itself, look at the sink: it beats the mask and everything else.
        self.rows("q")[:, -1, self.size + SOUND] = QUERY / self.sound
        self.rows("k")[:, -1, self.size + SINK_FLAG] = 4 * HIDDEN * scale / QUERY / self.sink

    def hide(self, flag: int, value: float) -> None:
        """Text does not see what has a flag, whose channel has this value or more behind the norm."""
        scale = math.sqrt(self.head + 2)
        self.rows("k")[:, -2, self.size + flag] = -HIDDEN * scale / QUERY / value

    def attention(self, state: Mapping[str, Tensor], query: Norm, memory: Norm) -> None:
        """Writes an attention of Whisper: `q_proj`, `k_proj`, `v_proj`, `out_proj`."""
        size, scale = self.size, math.sqrt((self.head + 2) / self.head)
        for name, norm, factor in (("q", query, scale), ("k", memory, 1.0), ("v", memory, 1.0)):
            weight, bias = norm.before(state[f"{name}_proj.weight"], state.get(f"{name}_proj.bias"))
            self.rows(name)[:, : self.head, :size] = factor * weight.view(self.heads, self.head, size)
            self.bias(name)[:, : self.head] = factor * bias.view(self.heads, self.head)
        # The bias of the output is the value of one more channel, so that sound does not get it.
        self.bias("v")[0, -2] = 1.0
        self.rows("v")[:, :, size + SINK_FLAG] = -self.bias("v") / self.sink
        out = self.tensors["self_attn.o_proj.weight"].view(self.hidden, self.heads, self.head + 2)
        out[:size, :, : self.head] = centered(state["out_proj.weight"]).view(size, self.heads, self.head)
        out[:size, 0, -2] = centered(state["out_proj.bias"])

    def feed_forward(self, state: Mapping[str, Tensor], norm: Norm) -> None:
        """Writes `fc1` and `fc2`; GELU of the gate, times one."""
        weight, bias = norm.before(state["fc1.weight"], state["fc1.bias"])
        self.tensors["mlp.gate_proj.weight"][: len(weight), : self.size] = weight
        self.tensors["mlp.gate_proj.bias"][: len(bias)] = bias
        self.tensors["mlp.down_proj.weight"][: self.size, : len(bias)] = centered(state["fc2.weight"])
        self.constant(len(bias), centered(state["fc2.bias"]))

    def constant(self, unit: int, value: Tensor, channel: int = 0) -> None:
        """Adds a value to text from a channel on, by a unit that sound gates off as it does the others."""
        self.tensors["mlp.gate_proj.bias"][unit] = 10.0
        self.tensors["mlp.down_proj.weight"][channel : channel + len(value), unit] = value / 10.0

    def positions(self, table: Tensor, flag: float, first: float) -> None:
        """Counts the text so far, and adds the position of each token: a step, of two units, from one to the next.

        Args:
            table: (n, D) positions.
            flag: of text.
            first: what the norm makes of the flag of the first token.
        """
        size, boost, scale = self.size, float(len(table)), math.sqrt(self.head + 2)
        self.hide(SOUND, self.sound)
        # The first token has `boost` times the weight of another, so token n sees boost / (boost + n) of it.
        self.rows("k")[:, -2, size + FIRST] = math.log(boost) * scale / QUERY / first
        self.rows("v")[0, 0, size + FIRST] = 1 / first
        self.tensors["self_attn.o_proj.weight"][size + COUNT, 0] = flag
        seen = boost / (boost + torch.arange(len(table), dtype=torch.float64))
        borders = (seen[1:] + seen[:-1]) / 2
        steep = 24_000.0  # several units at a quarter of the least distance, and still a number of half precision
        names = ("gate_proj.weight", "gate_proj.bias", "down_proj.weight")
        gate, bias, down = (self.tensors[f"mlp.{name}"] for name in names)
        for k, border in enumerate(borders.tolist()):
            for unit, shift, sign in ((2 * k, 0.0, 1.0), (2 * k + 1, -1.0, -1.0)):  # GELU(u) - GELU(u - 1): 0, then 1
                gate[unit, size + TEXT], gate[unit, size + COUNT], bias[unit] = steep * border, -steep, shift
                down[:size, unit] = sign * centered(table[k + 1] - table[k])
        self.constant(2 * len(borders), centered(table[0]))


def centered(written: Tensor) -> Tensor:
    """(D, ...) without its mean over D, which no norm of Whisper's lets through."""
    return written - written.mean(0)


def _rms(row: Tensor) -> float:
    return float((row.square().mean() + EPS).sqrt())


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def llama_of(
    state: Mapping[str, Tensor],
    heads: int,
    keep: Sequence[int],
    begin: tuple[int, int],
    prompts: int,
    audio_norm: float,
    rms: Sequence[float],
) -> tuple[LlamaForCausalLM, Tensor]:
    """The Llama of a Whisper decoder, float32, and the embedding (H,) of the first token of a text.

    Its vocabulary is: the kept tokens, the sink (a sequence starts with it), and `prompts` tokens each of which is the
    second token of a text, behind the first.

    Args:
        state: tensors of the decoder under the names of transformers, without `model.decoder.`.
        heads: of its attentions.
        keep: ids of the tokens of its vocabulary to keep, in their new order.
        begin: ids of the two tokens before a text.
        prompts: how many tokens stand for the second of them.
        audio_norm: Euclidean norm of an encoder state, on average.
        rms: the largest root mean square of its hidden states before each cross-attention, and the usual one before
            the last norm.
    """
    state = {name: value.float() for name, value in state.items()}
    table, positions = state["embed_tokens.weight"], state["embed_positions.weight"]
    layers, size = len(rms) - 1, table.shape[1]
    hidden, inner = size + EXTRA, state["layers.0.fc1.bias"].numel()
    if hidden % heads or 2 * len(positions) > inner:
        raise ValueError(
            f"{heads} heads do not divide {hidden}, or {inner} units are too few for {len(positions)} positions"
        )
    audio_rms = math.sqrt((BALLAST**2 + audio_norm**2) / hidden)
    scale = math.sqrt(size / hidden)
    final = part(state, "layer_norm.")
    bias = table @ final["bias"]
    flag = FLAG * float(table.norm(dim=1).median())
    # No text has these in it, so their scores are low.
    first, second = (text_row(table[begin[i]], SINK[BIAS] / BIAS_SCALE, flag, first=i == 0) for i in (0, 1))

    def layer() -> _Layer:
        return _Layer(size, heads, inner + SPARE, audio_rms)

    made = [layer()]
    made[0].positions(positions, flag, flag / _rms(first))
    for i in range(layers):
        own = part(state, f"layers.{i}.")
        text, sound = layer(), layer()
        norm = Norm(scale, part(own, "self_attn_layer_norm."))
        text.attention(part(own, "self_attn."), norm, norm)
        text.hide(SOUND, text.sound)
        sound.attention(part(own, "encoder_attn."), Norm(scale, part(own, "encoder_attn_layer_norm.")), Norm(audio_rms))
        sound.hide(TEXT, flag / rms[i])
        sound.hide(SINK_FLAG, sound.sink)
        sound.feed_forward(own, Norm(scale, part(own, "final_layer_norm.")))
        made += [text, sound]
    usual = rms[-1]
    level = 0.2 * usual * math.sqrt(hidden)  # of the channel of the last bias; the last norm sees it
    made[-1].constant(inner + 1, torch.tensor([level]), size + BIAS)
    more = math.sqrt(1.04)
    gains = torch.zeros(hidden)
    gains[:size] = final["weight"] * scale * more
    gains[size + BIAS] = usual * more / level / BIAS_SCALE

    rows = [text_row(table[i], float(bias[i]), flag) for i in keep]
    tensors = {"model.embed_tokens.weight": torch.stack([*rows, prefix_row(size), *[second] * prompts])}
    tensors |= {f"model.layers.{i}.{n}": v for i, one in enumerate(made) for n, v in one.tensors.items()}
    tensors["model.norm.weight"] = gains
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config: Any = LlamaConfig(
        vocab_size=len(rows) + 1 + prompts,
        hidden_size=hidden,
        intermediate_size=inner + SPARE,
        num_hidden_layers=len(made),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size // heads + 2,
        hidden_act="gelu",
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 1e9},
        rms_norm_eps=EPS * size / hidden,
        tie_word_embeddings=True,
        bos_token_id=len(rows),
        eos_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model, first
