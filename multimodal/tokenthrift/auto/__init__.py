"""The models in transformers' `AutoConfig`, `AutoModel` and `pipeline`, without remote code.

transformers has no entry points for models of other packages: a class is known once its package registered it. Doing
that at `import tokenthrift` would import transformers and torch for everybody, the command line included. So
`install` puts a finder in front of Python's own, which waits for two modules of transformers and registers right after
either is imported (or at once, where it already is). Nothing else is touched, and no other import passes through it.

configuration   `config.json` as a transformers configuration
modeling        the models as transformers models
processing      the small JSON files by which `AutoProcessor`, `AutoTokenizer` and `pipeline` find standard classes
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

__all__ = ["install"]

# A module of transformers, and ours whose `register` is called after it.
AWAITED: Final = {
    "transformers.models.auto.configuration_auto": "tokenthrift.auto.configuration",
    "transformers.models.auto.modeling_auto": "tokenthrift.auto.modeling",
}


def install() -> None:
    """Registers the models with transformers, now or as soon as it is imported; a second call does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in AWAITED:
        if name in sys.modules:
            _register(name)


def _register(name: str) -> None:
    try:
        import_module(AWAITED[name]).register()
    except Exception as error:  # Whatever is wrong here must not keep anybody from importing transformers.
        warnings.warn(f"tokenthrift's models are not known to transformers: {error!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds what the finders after it find; the loaders of awaited modules then register."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AWAITED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec  # type: ignore[no-any-return]
        return None


class _Loader(Loader):
    """Loads as the loader it stands for, which it puts back afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
