"""Imports every module of an installed package and says which ones need an extra; anything else that fails is an error.

    python .ci/import_everything.py      with nothing but `pip install tokenthrift`

Modules of training need the extra `train`, and say so; all others must import without any extra.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import tokenthrift
from tokenthrift.extras import EXTRAS


def main() -> int:
    """Returns 1 if a module fails for another reason than a missing extra, or needs one other than `train`."""
    imported = 0
    needing: list[str] = []
    failed: list[str] = []
    for module in pkgutil.walk_packages(tokenthrift.__path__, "tokenthrift.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            (needing if extra is not None else failed).append(f"{module.name}: {extra or error}")
        except ImportError as error:
            failed.append(f"{module.name}: {error}")
        else:
            imported += 1
    print(f"{imported} modules import, {len(needing)} need an extra")
    print("\n".join(["", *needing]))
    wrong = [line for line in needing if not line.endswith((": train", ": evaluation"))] + failed
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
