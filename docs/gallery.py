"""Draws docs/images from the shipped models and samples: `make gallery`. All numbers and texts are the models' own.

karl_tokens.png    two pictures from more and more tokens of KARL
vqtoken_codes.png  codes of VQToken over the frames of a synthetic clip, at 8, 16 and 32
mtsk_rates.png     errors of Llama-MTSK against tokens, from the table in its config.json; mtsk_synthetic.png likewise
dllm_rounds.svg    dLLM-ASR by diffusion, round by round, and its certified text; animated
attention.png      what the small video language model looks at when it answers
window.png         what multimodal-tiny looks at, for three questions about one window of three media

The last one needs SmolLM2-135M-Instruct, from the Hub or from the folder of TOKENTHRIFT_SMOLLM2, and is left out where
there is neither. Charts are for a phone: few lines, each named where it ends, words at least as large as a caption.
"""

from __future__ import annotations

import html
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tokenthrift.budget import DecodeBudget
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.karl import Karl
from tokenthrift.media.audio import read_audio
from tokenthrift.media.image import read_image, square
from tokenthrift.mtsk import LlamaMtsk
from tokenthrift.multimodal_lm import Media, MultimodalLM
from tokenthrift.vqtoken import VideoAnswerer
from tokenthrift.vqtoken.evaluation.visualize import draw_clip
from tokenthrift.vqtoken.synthetic.data import SyntheticClips

ROOT = Path(__file__).resolve().parents[1]
CARDS, SAMPLES = ROOT / "model_cards", ROOT / "samples"
RECORDING = "librivox-0920.flac"
COLORS = ("#00695c", "#c62828", "#5c6bc0")


def karl_tokens(out: Path) -> None:
    """Rows of pictures, columns of tokens, the error of each below it."""
    karl, counts = Karl.from_pretrained(CARDS / "karl-tiny-64"), (1, 4, 16, 32)
    images = torch.stack([square(read_image(path), 64) for path in sorted((SAMPLES / "pictures").glob("*.jpg"))])
    figure, axes = plt.subplots(len(images), len(counts) + 2, figsize=(5.2, 1.4 * len(images)), squeeze=False)
    shown = [karl.decode(karl.encode(images, count)) for count in counts]
    adaptive = karl.encode(images, "e0.12")
    for row, image in enumerate(images):
        own = [image, *(pictures[row] for pictures in shown), karl.decode(adaptive)[row]]
        titles = ["picture", *(str(count) for count in counts), f"e0.12:{adaptive.usage[row].used}"]
        for axis, picture, title in zip(axes[row], own, titles, strict=True):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            error = "L1" if title == "picture" else f"{float((picture - image).abs().mean()):.3f}"
            axis.set(title=title, xlabel=error, xticks=[], yticks=[])
    _save(figure, out / "karl_tokens.png")


def vqtoken_codes(out: Path) -> None:
    """The regions of every code keep their color over the frames."""
    model, clip = VideoAnswerer.from_pretrained(CARDS / "vqtoken-tiny"), SyntheticClips("test", 4)[1]
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    tokens = model.encode(frames[None].float() / 255)
    maps = {f"{count} codes of 512 tokens": model.vqtoken.compress(tokens, count).maps[0] for count in (8, 16, 32)}
    draw_clip(out / "vqtoken_codes.png", "synthetic clip", frames, torch.arange(len(frames)) / 4, maps, columns=4)


def mtsk_rates(out: Path) -> None:
    """Real speech of one speaker."""
    _rates("mtsk-grid-en", "real voice and lips", out / "mtsk_rates.png")


def mtsk_synthetic(out: Path) -> None:
    """Synthetic speech."""
    _rates("mtsk-tiny-en", "synthetic speech", out / "mtsk_synthetic.png")


def _rates(model: str, speech: str, path: Path) -> None:
    """Development errors against tokens a second, clean and at 0 dB."""
    table = LlamaMtsk.from_pretrained(CARDS / model).config.table
    figure, axis = plt.subplots(figsize=(5, 3.8))
    kinds = {"sound and lips": (True, True), "sound": (True, False), "lips": (False, True)}
    for color, (name, (audio, video)) in zip(COLORS, kinds.items(), strict=True):
        rows = [row for row in table if (row.audio > 0, row.video > 0) == (audio, video)]
        for snr, style in ((None, "-"), (0.0, "--")):
            own = sorted((_tokens(row), 100 * row.wer) for row in rows if row.snr == snr)
            if own and (audio or snr is None):  # noise does not change what is seen
                x, y = zip(*own, strict=True)
                axis.plot(x, y, style, color=color, marker="o", markersize=4)
                label = f"{name}, {'clean' if snr is None else '0 dB'}" if audio else name
                # Beside the end of a line that ends alone, else above its beginning.
                at, end = (-1, (6, -4)) if audio and video else (0, (0, 9))
                axis.annotate(label, own[at], end, color=color, fontsize=10, textcoords="offset points")
    axis.set(xlabel="tokens a second", ylabel=f"word error rate (%), {speech}", xlim=(0, 40), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _tokens(row: Any) -> float:
    return (50 / row.audio if row.audio else 0) + (25 / row.video if row.video else 0)


def rounds_of(model: DllmAsr, audio: Tensor) -> list[list[tuple[str, bool]]]:
    """What stands on the canvas before each round of diffusion and at its end: words, and whether committed."""
    seen: list[list[int]] = []
    hook = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    settings = replace(model.config.decode, certify=None)
    try:
        (final,) = model.decode(*model.encode([audio]), settings=settings)
    finally:
        hook.remove()
    vocabulary, states = model.vocabulary, []
    for ids in seen:
        words: list[tuple[str, bool]] = []
        for token in ids:
            if token in (vocabulary.eos_id, vocabulary.delete_id, vocabulary.start_id):
                continue
            text = "▁" if token == vocabulary.mask_id else vocabulary.pieces([token])[0]
            if words and not text.startswith(" ") and text != "▁":
                words[-1] = (words[-1][0] + text, words[-1][1])
            else:
                words.append((text.strip(), token != vocabulary.mask_id))
        states.append(words)
    return [*states, [(word, True) for word in final.text.split()]]


def dllm_rounds(out: Path) -> None:
    """An animated SVG: one line for each round, open slots as boxes."""
    model = DllmAsr.from_pretrained(CARDS / "dllm-asr-tiny-en")
    audio = read_audio(SAMPLES / "speech" / RECORDING)
    states = rounds_of(model, audio)
    (draft,) = model.transcribe([audio], decode=DecodeBudget(max_rounds=1))
    lines = [("one round alone", [(word, True) for word in draft.text.split()])]
    lines += [(f"before round {i + 1}", words) for i, words in enumerate(states[:-1])]
    (certified,) = model.transcribe([audio])
    lines += [("by diffusion", states[-1]), ("certified: left to right", [(w, True) for w in certified.text.split()])]
    (out / "dllm_rounds.svg").write_text(_animated(lines), encoding="utf-8")


def _animated(lines: Sequence[tuple[str, Sequence[tuple[str, bool]]]], width: int = 440) -> str:
    parts, y = [], 0
    for number, (caption, words) in enumerate(lines):
        y += 18
        block = [f'<text class="c" x="8" y="{y}">{html.escape(caption)}</text>']
        x, y = 8.0, y + 22
        for word, committed in words:
            size = 14.0 if not committed else 9.05 * len(word)  # of a monospace letter of 15 pixels
            if x + size > width - 8:
                x, y = 8.0, y + 22
            if committed:
                block.append(f'<text class="w" x="{x:.0f}" y="{y}">{html.escape(word)}</text>')
            else:
                block.append(f'<rect class="o" x="{x:.0f}" y="{y - 12}" width="14" height="14" rx="2"/>')
            x += size + 8
        start, seconds = number / (len(lines) + 1), len(lines) + 2
        times = f"0;{start:.2f};{start + 0.4 / (len(lines) + 1):.2f};1"
        fade = f'<animate attributeName="opacity" values="0;0;1;1" keyTimes="{times}" dur="{seconds}s"/>'
        parts.append(f"<g>{fade}{''.join(block)}</g>")
        y += 10
    style = ".c{font:12px sans-serif;fill:#888}.w{font:15px monospace;fill:#00695c}.o{fill:#ffe0b2;stroke:#fb8c00}"
    box = f'viewBox="0 0 {width} {y + 8}" width="{width}" height="{y + 8}"'
    background = f'<rect width="{width}" height="{y + 8}" fill="#fff" rx="6"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{style}</style>{background}{"".join(parts)}</svg>\n'


def attention(out: Path) -> None:
    """The attention of the question's last token over 32 codes, painted where the codes are."""
    model, clip = VideoAnswerer.from_pretrained(CARDS / "vqtoken-tiny"), SyntheticClips("test", 4)[1]
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    clips, question = frames[None].float() / 255, clip.questions[0].text
    layers: list[Tensor] = []
    model.lm.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, outputs: layers.append(outputs[1]))
        for layer in model.lm.model.layers
    ]
    try:
        answer = model.answer(clips, [[question]], budget=32)[0][0]
    finally:
        for hook in hooks:
            hook.remove()
    coded = model.vqtoken.compress(model.encode(clips), 32)
    # The last pass is that of the question; its last row belongs to the answer.
    weights = torch.stack([layer[0, :, -1] for layer in layers[-len(hooks) :]]).mean((0, 1))
    share = weights[: coded.tokens.usage[0].used]
    picture = share[coded.maps[0]]
    shown = range(1, len(frames), 2)
    figure, axes = plt.subplots(2, len(shown), figsize=(5.2, 3.2))
    for column, frame in enumerate(shown):
        axes[0, column].imshow(frames[frame].permute(1, 2, 0))
        axes[1, column].imshow(picture[frame], cmap="viridis", vmin=0, vmax=float(picture.max()))
        for axis in axes[:, column]:
            axis.axis("off")
    figure.suptitle(f"{question}\n{answer.word} ({answer.confidence:.0%}), looking at:", fontsize=11)
    _save(figure, out / "attention.png")


def window(out: Path) -> None:
    """The attention of the last token of three questions over one window, a bar for each token."""
    try:
        named = os.environ.get("TOKENTHRIFT_SMOLLM2")
        model = MultimodalLM.from_pretrained(CARDS / "multimodal-tiny", language_model=named)
    except OSError as error:
        print(f"window.png is left out, as SmolLM2 is not there: {error}")
        return
    model.lm.set_attn_implementation("eager")
    frames = torch.from_numpy(SyntheticClips("test", 4)[1].frames).permute(0, 3, 1, 2).float() / 255
    photo = square(read_image(SAMPLES / "pictures" / "hopper.jpg"), 64)
    media = [Media("image", photo), Media("video", frames), Media("audio", read_audio(SAMPLES / "speech" / RECORDING))]
    names = ["picture", "clip", "sound"]
    labels = [part for one in zip(("Picture:", "Clip:", "Sound:"), media, strict=True) for part in one]
    questions = ("what is in the picture?", "which way does it move?", "which digit is said?")
    figure, axes = plt.subplots(len(questions), 1, figsize=(5.2, 5.2), sharex=True, sharey=True)
    for axis, question in zip(axes, questions, strict=True):
        prompt = [*labels, f"Question: {question} Answer:"]
        prepared = model.prepare([prompt], total=64, split="value")
        with torch.inference_mode():
            layers = model.lm(inputs_embeds=prepared.rows[0][None], output_attentions=True).attentions
        weights = torch.stack([layer[0, :, -1] for layer in layers]).mean((0, 1))
        (answer,) = model.answer([prompt], total=64, split="value", max_new_tokens=4)
        start, used = 0, iter(zip(names, prepared.usage[0], strict=True))
        for part in prompt:
            name, color = "words", "#b0bec5"
            length = len(model.token_ids(part)) if isinstance(part, str) else 0
            if not length:
                name, usage = next(used)
                length, color = usage.used, COLORS[names.index(name)]
            own = weights[start : start + length]
            axis.bar(range(start, start + length), own, color=color, width=0.9)
            if name != "words":
                where = (start + length / 2 - 0.5, float(own.max()))
                place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{name} {own.sum():.0%}", where, color=color, fontsize=10, **place)
            start += length
        axis.set_title(f"{question} {answer.text}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(yticks=[])
    axes[-1].set_xlabel("tokens of the window; gray: words")
    _save(figure, out / "window.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# Drawings that a card shows too.
IN_CARDS = {
    "karl_tokens.png": "karl-tiny-64/tokens.png",
    "mtsk_synthetic.png": "mtsk-tiny-en/rates.png",
    "dllm_rounds.svg": "dllm-asr-tiny-en/rounds.svg",
}
DRAWINGS = {
    f.__name__: f for f in (karl_tokens, vqtoken_codes, mtsk_rates, mtsk_synthetic, dllm_rounds, attention, window)
}


def main(arguments: Sequence[str]) -> int:
    """Draws all, or those named; `--out FOLDER` puts them elsewhere."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else ROOT / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    named = [name for name in arguments if name in DRAWINGS]
    for name in named or DRAWINGS:
        DRAWINGS[name](out)
        print(name)
    for name, card in IN_CARDS.items():
        if out == ROOT / "docs" / "images" and (out / name).is_file():
            shutil.copyfile(out / name, CARDS / card)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
