"""Token budgets for multimodal language models: know what an input costs before it runs, and keep to it.

`import tokenthrift` loads no dependency, torch neither. What it gives:

    __version__             the version
    load(source)            whatever model a folder or a Hub repository holds
    list_models()           the models on this machine that `load` takes
    attach, TokenBudget     the two names that most programs start with

Everything else is imported from its module: `from tokenthrift.karl import Karl`. From here on transformers'
`AutoConfig`, `AutoModel`, `AutoProcessor` and `pipeline` know the models too; see `tokenthrift.auto`.

The package lies in three source roots (`multimodal/`, `tokenizers/`, `asr/`), since a top-level package `tokenizers`
would hide the one that transformers imports. A namespace package without this file has no version, and importing it
cannot register anything. So one root has an `__init__.py`, and `extend_path` finds the other two in a checkout; a wheel
merges the three.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

# Spelled as tools that read sources look for it (griffe, for the documentation).
__path__ = __import__("pkgutil").extend_path(__path__, __name__)

from tokenthrift import auto
from tokenthrift.version import __version__

if TYPE_CHECKING:
    from tokenthrift.attachment import attach
    from tokenthrift.budget import TokenBudget
    from tokenthrift.models import list_models, load

__all__ = ["TokenBudget", "__version__", "attach", "list_models", "load"]

_HOMES: Final = {"TokenBudget": "budget", "attach": "attachment", "list_models": "models", "load": "models"}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


auto.install()
