"""Registries of the parts of a speculation: drafters, trees, verifiers and length rules.

A part is a dataclass whose fields are its options, known by its name and written ``name(option=value)``. One
part, one file in its package; a file that is added there is found. Other packages add theirs through the
entry points ``graphwright.drafters``, ``graphwright.trees``, ``graphwright.verifiers`` and
``graphwright.length_rules``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

from graphwright.ir.errors import InputError
from graphwright.ir.spelling import PartParser, spell

P = TypeVar("P")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[P]):
    """The parts of one kind, by name.

    Args:
        kind: what one of them is called in messages.
        package: dotted name of the package with one module a part.
        example: shown where a text does not parse.
        group: of the entry points.
    """

    def __init__(self, kind: str, package: str, example: str, group: str) -> None:
        self.kind, self._package, self._example, self._group = kind, package, example, group
        self.known: dict[str, type[P]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: make a dataclass known under ``name``; its docstring's first line describes it."""

        def add(cls: C) -> C:
            cls.name = name
            self.known[name] = cls
            return cls

        return add

    def classes(self) -> dict[str, type[P]]:
        """Every part's class by name."""
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            for point in entry_points(group=self._group):
                if point.name not in self.known:
                    self.register(point.name)(point.load())
        return self.known

    def describe(self) -> dict[str, str]:
        """Every part's name and what it is, in one line each."""
        found = sorted(self.classes().items())
        return {name: (inspect.getdoc(cls) or "").partition("\n")[0] for name, cls in found}

    def parse(self, text: str) -> P:
        """A part from ``name(option=value)``.

        Raises:
            InputError: it does not parse, or there is no such part or option; the message points at the
                character and names what is near.
        """
        return PartParser(text, self.classes(), InputError, self.kind, self._example).whole()

    def make(self, name: str, **options: Any) -> P:
        """The part ``name`` with options that need not be writable as text.

        Raises:
            InputError: there is no such part or option.
        """
        cls = self.classes().get(name)
        if cls is None:
            return self.parse(name)  # raises, with the nearest names
        accepted = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        wrong = sorted(set(options) - set(accepted))
        if wrong:
            raise InputError(
                f"{self.kind} '{name}' has no option {', '.join(wrong)}",
                where=f"{self.kind}={name}",
                hint=f"its options are {', '.join(accepted) or 'none'}",
            )
        return cls(**options)


class Part:
    """Base of every part: prints as it is written."""

    name: ClassVar[str] = ""

    def __str__(self) -> str:
        return spell(self) if dataclasses.is_dataclass(self) else self.name
