"""Commands that pages show: those of their shell blocks, as a shell reads them, and those inside a line of text.

One bash reads all blocks of a page. It finds no program, so every command ends in `command_not_found_handle`, which
notes its words; variables, loops and quotes are bash's own. No file is written: a redirection is noted as words too.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/README.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = r"tokenthrift [a-z]+ -|tokenthrift \w+ \w+ -|python \.?\w+/"
INLINE = re.compile(rf"`((?:taskset -c \d+\s|OMP_NUM_THREADS=\d+\s)*(?:{RUN})[^`]+)`")
INTO = "@into"
PRELUDE = r"""
exec 3>&1
HERE=.
cd() { HERE=$HERE/$1; }
command_not_found_handle() { printf '%s\0' "$HERE" "$#" "$@" >&3; }
set -efu -o pipefail
"""


@dataclass(frozen=True)
class Command:
    """Words of a command.

    Attributes:
        words: as the program gets them.
        folder: of the repository, in which it runs.
        into: the file that its output goes to.
        whole: whether nothing is left out, as in a line of text.
    """

    words: tuple[str, ...]
    folder: str = "."
    into: str | None = None
    whole: bool = True

    def path(self, word: str) -> str:
        """A path as it is called from the root."""
        return posixpath.normpath(posixpath.join(self.folder, word))


def without_prefix(words: list[str]) -> list[str]:
    """A command without the core and the variables that it runs with."""
    while words and ("=" in words[0] or words[0] == "taskset"):
        words = words[3:] if words[0] == "taskset" else words[1:]
    return words


def shell_commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in their order; blocks share variables and the folder."""
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    bash = shutil.which("bash")
    assert bash is not None
    text = re.sub(r"^[\w.-]+/bin/(?=\w)", "", text, flags=re.MULTILINE)  # of an environment
    script = PRELUDE + re.sub(r"(?<=\s)>\s*(?=[\w$])", f"{INTO} ", text)
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=False, env={"PATH": "/none"})
    assert (done.returncode, done.stderr) == (0, ""), f"{page}: {done.stderr}"
    fields = done.stdout.split("\0")[:-1]
    found = []
    while fields:
        folder, count, *fields = fields
        words, fields = without_prefix(fields[: int(count)]), fields[int(count) :]
        into = None
        if INTO in words:
            words, (_, into) = words[: words.index(INTO)], words[words.index(INTO) :]
        found.append(Command(tuple(words), posixpath.normpath(folder), into))
    return found


def inline_commands(page: Path) -> list[Command]:
    """Commands in a line of text; what they leave out (`...`) is not among their words."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = []
    for text in INLINE.findall(prose):
        words = without_prefix([word for word in shlex.split(text) if word != "..."])
        found.append(Command(tuple(words), whole=False))
    return found
