"""The page of `tokenthrift demo`, served on the loopback and opened in headless Chromium; needs gradio and Chromium."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

from gradio_client import Client, handle_file

from tests.tokenizers.karl.tiny_karl import tiny_karl
from tokenthrift.demo.page import TITLE, build

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_runs_on_this_machine_only(tmp_path: Path) -> None:
    tiny_karl().save_pretrained(tmp_path / "karl")
    page = build([str(tmp_path / "karl")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, quiet=True)
    try:
        address = f"http://127.0.0.1:{port}/"
        picture = handle_file(str(ROOT / "samples/pictures/street.jpg"))
        few, many = (
            Client(address, verbose=False).predict(picture, str(tmp_path / "karl"), percent, 4, api_name="/run")
            for percent in (25, 100)
        )
        assert "known before it ran" in few[0]
        assert few[0] != many[0]
        assert Path(few[2] if isinstance(few[2], str) else few[2]["path"]).is_file()
        (tmp_path / "cut.png").write_bytes(Path(picture["path"]).read_bytes()[:200])
        odd = Client(address, verbose=False).predict(
            handle_file(str(tmp_path / "cut.png")), None, 25, 4, api_name="/run"
        )
        assert odd[0].startswith("cut.png: ")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        assert chromium, "Chromium is needed"
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        seen = subprocess.run(
            [*command, f"--user-data-dir={tmp_path / 'chromium'}", address],
            capture_output=True, text=True, timeout=300, check=True,
        ).stdout  # fmt: skip
        assert TITLE in seen
        assert "percent of the native tokens" in seen
    finally:
        page.close()
