"""The rewrites. Each file registers one pass; importing the package makes them all known.

The package is callable: ``graphwright.passes()`` is the public listing, and Python binds the name of an
imported subpackage on its parent.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


class _CallablePackage(types.ModuleType):
    def __call__(self) -> dict[str, str]:
        """Every rewrite with one line, those of other packages included."""
        from graphwright.passes.base import describe_passes

        return describe_passes()


sys.modules[__name__].__class__ = _CallablePackage
