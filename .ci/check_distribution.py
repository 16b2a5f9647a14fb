"""Looks into a folder of distributions: one wheel, one source distribution, metadata that an index shows, no surprises.

python .ci/check_distribution.py dist
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

LIMIT = 5_000_000  # bytes; weights belong on the Hub


def main(folder: str) -> int:
    """Returns 1 and says what is wrong, if anything is."""
    wheels, sources = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
    problems = [] if len(wheels) == len(sources) == 1 else [f"{len(wheels)} wheels and {len(sources)} sources"]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            names = file.namelist()
            (name,) = (name for name in names if name.endswith("/METADATA"))
            metadata = HeaderParser().parsestr(file.read(name).decode())
        problems += [f"{wheel.name} lacks {field}" for field in FIELDS if not metadata.get_all(field)]
        problems += [f"{wheel.name} holds {n}" for n in names if not n.startswith("tokenthrift")]
        if not str(metadata.get_payload()).lstrip().startswith("# Tokenthrift"):
            problems.append(f"{wheel.name} does not show the README")
        links = re.findall(r"\]\((?!https:)([^)]*)\)", str(metadata.get_payload()))
        problems += [f"{wheel.name}: {link} leads nowhere on a package index" for link in links]
    for source in sources:
        with tarfile.open(source) as archive:
            names = [member.name.partition("/")[2] for member in archive if member.isfile()]
        problems += [
            f"{source.name} lacks {name}" for name in ("LICENSE", "README.md", "pyproject.toml") if name not in names
        ]
    problems += [
        f"{path.name} is larger than {LIMIT:,} bytes" for path in wheels + sources if path.stat().st_size > LIMIT
    ]
    print("\n".join(problems or [f"{path.name}  {path.stat().st_size / 1e3:.0f} kB" for path in wheels + sources]))
    return 1 if problems else 0


FIELDS = ("Author", "Classifier", "Keywords", "License-Expression", "Project-URL", "Requires-Python", "Summary")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
