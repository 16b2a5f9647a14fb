"""The page of a report: what is on it, in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import fake_recognizer
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice, write
from tokenthrift.transcription import Recording, Transcriber
from tokenthrift.transcription.cli import main
from tokenthrift.transcription.page import page_entry

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=document.title=1>"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A long recording, a short one with a reference, a broken one with an evil name, and silence."""
    source = tmp_path / "in"
    write(source / "long.wav", voice(4.0, pitch=200))
    write(source / "short.wav", voice(2.0, pitch=150))
    (source / f"{EVIL}.wav").write_text("no sound")
    manifest = '{"audio_filepath": "short.wav", "text": "Pitch 150 and pitch 150."}\n'
    (source / "manifest.jsonl").write_text(manifest)
    model, report = fake_recognizer.save(tmp_path / "model"), tmp_path / "report.html"
    assert main([str(source), "--model", str(model), "--report", str(report), "--references"]) == 1
    return report


def test_the_page_needs_nothing_else_and_escapes_everything(page: Path) -> None:
    text = page.read_text()
    assert EVIL not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert text.count("<svg") == text.count("<audio") == 2
    assert f'src="file://{page.parent}/in/long.wav"' in text
    assert "<del>and</del>" in text, "the word that is missing is marked"
    assert re.search(r'data-key="0\.2">20\.0%', text), "one error in five words"
    assert 'title="0.5' in text
    assert 'data-start="0.5"' in text
    assert "not a recording" in text


def test_a_resumed_job_has_all_recordings_on_its_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.wav", voice(1.0))
    model, report = fake_recognizer.save(tmp_path / "model"), tmp_path / "report.html"
    command = [str(tmp_path / "in"), "--model", str(model), "--out-dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--report", str(report)]) == 0
    assert report.read_text().count("<tbody>") == 2


def test_a_word_of_a_part_is_played_from_where_it_is_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", voice(4.0))
    (part,) = Transcriber(FakeRecognizer()).transcribe(Recording(path, offset=2.0))
    words = page_entry(0, part, None)["words"]
    assert [round(start, 1) for *_, start in words] == [round(word.start + 2.0, 1) for word in part.words]
    assert words[0][2] >= 2.0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Columns sort both ways, numbers as numbers, and no file's name runs a program."""

    def order(clicks: int) -> list[str]:
        script = f"<script>for (let i = 0; i < {clicks}; i++) document.querySelectorAll('th')[2].click()</script>"
        copy = page.with_name(f"clicked-{clicks}.html")
        copy.write_text(page.read_text().replace("</body>", f"{script}</body>"))
        command = [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        done = subprocess.run(
            [*command, "--virtual-time-budget=2000", "--dump-dom", f"file://{copy}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "<title>Transcripts</title>" in done.stdout
        return re.findall(r"(long|short|onerror)[^<]*</td><td class", done.stdout)

    assert order(0) == ["onerror", "long", "short"]
    assert order(1) == ["onerror", "short", "long"]
    assert order(2) == ["long", "short", "onerror"]
