"""The page around `show`, by gradio (an extra): a file, a model, two sliders, and what they give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tokenthrift.demo.showing import respond
from tokenthrift.extras import require

__all__ = ["build"]

TITLE = "Tokenthrift: fewer tokens for pictures, clips and recordings"


def build(models: Sequence[str]) -> Any:
    """The page, not yet served.

    Args:
        models: folders or `owner/name`, to choose from.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = require("gradio")

    def run(path: str | None, model: str | None, percent: float, rounds: float) -> tuple[str, str, str | None]:
        """Runs after every change."""
        return respond(path, model, percent, rounds, models)

    with gradio.Blocks(title=TITLE) as page:
        gradio.Markdown(f"# {TITLE}")
        with gradio.Row():
            with gradio.Column():
                path = gradio.File(label="a picture, a clip or a recording", type="filepath")
                model = gradio.Dropdown(list(models), value=models[0], label="model")
                percent = gradio.Slider(1, 100, value=50, step=1, label="budget: percent of the native tokens")
                rounds = gradio.Slider(
                    0, 16, value=0, step=1, label="rounds of decoding, at most; 0: as the model is set"
                )
            with gradio.Column():
                tokens = gradio.Textbox(label="tokens", elem_id="tokens")
                text = gradio.Textbox(label="result", elem_id="result")
                picture = gradio.Image(label="picture", type="filepath")
        inputs, outputs = [path, model, percent, rounds], [tokens, text, picture]
        for part in (path, model, percent, rounds):
            part.change(run, inputs, outputs, api_name="run" if part is path else False)
    return page
