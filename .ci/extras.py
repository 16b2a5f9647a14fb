"""What each extra brings beyond the core, and its size on disk, from the environment that this runs in.

python .ci/extras.py            a table in Markdown
python .ci/extras.py --write    puts it into docs/install.md
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "install.md"
PROJECT = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PURPOSE = {
    "": "budgets, reducers, `attach`, models, `plan`, `transcribe`",
    "train": "`tokenthrift fit` by Lightning",
    "audio": "room acoustics in the training of Llama-MTSK",
    "video": "clips, and pictures",
    "vision": "torchvision and timm: VQToken's small model, `fit` on images",
    "evaluation": "`tokenthrift evaluate`, error rates, plots",
    "lora": "LoRA on language models by peft",
    "lips": "lips from ordinary video",
    "ctranslate2": "Whisper by CTranslate2 in `tokenthrift transcribe`",
    "vad": "windows that follow speech, by Silero VAD",
    "ray": "`tokenthrift transcribe` and `tokenize` over several machines by Ray",
    "shards": "Parquet tables in and out of `tokenthrift tokenize`",
    "perceptual": "EffNet-lite0 distance in the training of KARL",
    "all": "all of these but `demo`",
}
# `test` is for developers; `demo` asks for versions that `all` does not have, so an environment holds one of them.
ELSEWHERE = {"test", "demo"}


def main(arguments: list[str]) -> int:
    """Prints or writes the table."""
    extras = set(PROJECT["optional-dependencies"]) - ELSEWHERE
    if unknown := extras ^ (set(PURPOSE) - {""}):
        raise SystemExit(f"PURPOSE and pyproject.toml differ in {sorted(unknown)}")
    core = closure("tokenthrift", "")
    lines = ["| extra | for | packages | MB |", "| --- | --- | --- | --- |"]
    for extra, purpose in PURPOSE.items():
        more = closure("tokenthrift", extra) - (core if extra else set())
        direct = sorted(Requirement(line).name for line in PROJECT["optional-dependencies"].get(extra, ()))
        names = ", ".join(name for name in direct if canonicalize_name(name) in more and name != "tokenthrift")
        label = f"`{extra}`" if extra else "(none)"
        count = f"{len(more)}" + (f": {names}" if names else "")
        lines.append(f"| {label} | {purpose} | {count} | {sum(map(size, more)) / 1e6:,.0f} |")
    table = "\n".join(lines)
    if "--write" in arguments:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- extras:begin -->\n")
        _, _, after = rest.partition("<!-- extras:end -->")
        PAGE.write_text(f"{before}<!-- extras:begin -->\n{table}\n<!-- extras:end -->{after}", encoding="utf-8")
    print(table)
    return 0


def needed(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement belongs to an extra, here."""
    if requirement.marker is None:
        return not extra
    return requirement.marker.evaluate({"extra": extra}) and not (extra and requirement.marker.evaluate({"extra": ""}))


def closure(name: str, extra: str) -> set[str]:
    """Installed distributions that a distribution needs, with one of its extras, itself left out."""
    found: set[str] = set()
    waiting = [(name, ""), *([(name, extra)] if extra else [])]
    seen = set(waiting)
    while waiting:
        current, kind = waiting.pop()
        try:
            lines = _own(kind) if current == name else requires(current) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if not needed(requirement, kind):
                continue
            target = canonicalize_name(requirement.name)
            if target != name:
                found.add(target)
            for more in ("", *requirement.extras):
                if (target, more) not in seen:
                    seen.add((target, more))
                    waiting.append((target, more))
    return {target for target in found if installed(target)}


def _own(extra: str) -> list[str]:
    """What this project asks for; its installed metadata may be older."""
    lines: list[str] = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return (
        [f"{line} and extra == '{extra}'" if ";" in line else f"{line}; extra == '{extra}'" for line in lines]
        if extra
        else lines
    )


def installed(name: str) -> bool:
    """Whether a distribution is there; markers of other platforms name some that are not."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    files = distribution(name).files or []
    paths = {Path(str(file.locate())) for file in files}
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
