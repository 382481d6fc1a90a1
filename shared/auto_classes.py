"""tide's model types in transformers' Auto classes, for who imports tide and transformers, in whichever order.

Importing transformers for this would make `import tide` slow, so nothing is imported: the first configuration that an
Auto class reads (models and tokenizers read one too) registers the families before it is looked up.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.configuration_auto"


def offer_families() -> None:
    """Arrange it: at once where transformers is imported already, else when it is. Calling it again is harmless."""
    module = sys.modules.get(_MODULE)
    if hasattr(module, "AutoConfig"):
        _register_on_use(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_on_use(module: Any) -> None:
    """Let the next `AutoConfig.from_pretrained` register the families; it is itself again from then on."""
    auto_config = module.AutoConfig
    original = auto_config.__dict__["from_pretrained"]
    if getattr(original.__func__, "is_tides", False):
        return

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if auto_config.__dict__["from_pretrained"] is ours:
            auto_config.from_pretrained = original
        from .models.specs import register_families

        register_families()
        return original.__get__(None, cls)(*args, **kwargs)

    from_pretrained.__doc__ = original.__func__.__doc__
    from_pretrained.is_tides = True  # type: ignore[attr-defined]
    ours = classmethod(from_pretrained)
    auto_config.from_pretrained = ours


class _Finder(importlib.abc.MetaPathFinder):
    """Notices the import of the one module, and is gone afterwards."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _MODULE:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register_on_use(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
