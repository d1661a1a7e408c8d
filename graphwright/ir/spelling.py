"""Parts as text: ``uniform(bits=4)`` is an instance of the dataclass that is known as ``uniform``."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from graphwright.ir.errors import GraphwrightError

_NAME = re.compile(r"[A-Za-z_]\w*")
_VALUE = re.compile(r"[^,()\s]+")
P = TypeVar("P")


def spell(part: Any) -> str:
    """A part as :class:`PartParser` reads it: ``name(option=value)``, without options that are as usual."""
    changed = [
        f"{f.name}={getattr(part, f.name)}"
        for f in _fields(part)
        if f.default is dataclasses.MISSING or getattr(part, f.name) != f.default
    ]
    return f"{part.name}({', '.join(changed)})" if changed else str(part.name)


class PartParser(Generic[P]):
    """Reads parts from a text.

    Args:
        text: what to read.
        known: dataclasses by name.
        error: raised where the text does not parse; the message points at the character.
        kind: what one of them is called.
        example: shown where there is no better hint.
    """

    def __init__(
        self,
        text: str,
        known: Mapping[str, type[P]],
        error: type[GraphwrightError],
        kind: str,
        example: str,
    ) -> None:
        self.text, self.known = text, known
        self.error_class, self.kind, self.example = error, kind, example
        self.at = 0

    def chain(self, sign: str) -> list[P]:
        """All of the text: parts with ``sign`` between them."""
        parts = [self.part()]
        while self.at < len(self.text):
            self.expect(sign, f"{sign!r} between parts")
            parts.append(self.part())
        return parts

    def whole(self) -> P:
        """All of the text: one part."""
        part = self.part()
        if self.at < len(self.text):
            raise self.error("expected nothing more", self.at, "")
        return part

    def part(self) -> P:
        """The next part."""
        known = self.known
        start = self.skip()
        name = self.match(_NAME, f"the name of a {self.kind}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise self.error(
                f"there is no {self.kind} named {name!r}", start, f"did you mean {', '.join(near)}?"
            )
        options = self.options(known[name]) if self.peek("(") else {}
        self.skip()
        missing = [
            f.name for f in _fields(known[name]) if f.default is dataclasses.MISSING and f.name not in options
        ]
        if missing:
            raise self.error(f"{name} needs {missing[0]}", start, f"write {name}({missing[0]}=...)")
        try:
            return known[name](**options)
        except self.error_class as error:
            raise self.error(error.what, start, error.hint or "") from None

    def options(self, cls: type[P]) -> dict[str, Any]:
        self.expect("(", "'('")
        types = get_type_hints(cls)
        names = [f.name for f in _fields(cls)]
        options: dict[str, Any] = {}
        while not self.peek(")"):
            if options:
                self.expect(",", "',' or ')'")
            start = self.skip()
            key = self.match(_NAME, "the name of an option")
            if key not in names:
                raise self.error(
                    f"{_name_of(cls)} has no option {key!r}",
                    start,
                    f"its options: {', '.join(names) or 'none'}",
                )
            self.expect("=", "'=' and a value")
            at = self.skip()
            value = self.match(_VALUE, "a value")
            try:
                options[key] = _convert(types[key], value)
            except ValueError:
                kind = getattr(types[key], "__name__", str(types[key]))
                raise self.error(f"{value!r} is not a value for {key}", at, f"give a {kind}") from None
        self.expect(")", "')'")
        return options

    # --- characters ------------------------------------------------------------------------------

    def skip(self) -> int:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.at)

    def expect(self, token: str, what: str) -> None:
        if not self.peek(token):
            raise self.error(f"expected {what}", self.at, "")
        self.at += len(token)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"expected {what}", self.at, "")
        self.at = found.end()
        return found[0]

    def error(self, what: str, at: int, hint: str) -> GraphwrightError:
        """An error that points at a character."""
        return self.error_class(
            f"{what} (character {at + 1})",
            where=f"{self.text}\n         {' ' * at}^",
            hint=hint or f"for example {self.example}",
        )


def _name_of(cls: Any) -> str:
    return str(cls.name)


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The options; what a part keeps for itself is none."""
    return tuple(f for f in dataclasses.fields(cls) if f.init)


def _convert(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text) if kind in (int, float) else text
