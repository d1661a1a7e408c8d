"""Target files: TOML, a source for every figure, and nothing that a prediction would silently ignore."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

from graphwright.cost_model.target import VENDORS, Target
from graphwright.ir.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("cpu", "cuda", "rocm")
_WORDS = ("name", "title", "vendor", "kind", "arch")
_LISTS = ("aliases", "device_names")
_FIGURES = ("memory", "bandwidth", "launch_overhead")
_OPTIONAL = ("on_chip_cache",)
_HINT = "the files beside h100.toml show what a target file holds"


def load_target(path: str | Path) -> Target:
    """Read a target file.

    Raises:
        InputError: not readable, not TOML, an entry that does not belong there, or a figure that is missing,
            absurd or without a source.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not a readable target file: {error}", where=str(path), hint=_HINT) from None
    return _File(data, str(path)).target()


class _File:
    """One file's entries, each checked when it is read."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.sources: dict[str, str] = {}

    def target(self) -> Target:
        known = (*_WORDS, *_LISTS, *_FIGURES, *_OPTIONAL, "peak_flops", "measured")
        self.require_known(self.data, known, "")
        name, title, vendor, kind = (self.word(entry) for entry in _WORDS[:4])
        self.require_one_of("vendor", vendor, VENDORS)
        self.require_one_of("kind", kind, KINDS)
        numbers = {entry: self.figure(entry, self.data.get(entry)) for entry in _FIGURES}
        numbers |= {entry: self.figure(entry, self.data[entry]) for entry in _OPTIONAL if entry in self.data}
        try:
            return Target(
                name=name, title=title, vendor=vendor, kind=kind, arch=self.word("arch", empty=True),
                aliases=self.names("aliases"), device_names=self.names("device_names"),
                memory_bytes=numbers.pop("memory"), **numbers, peak_flops=self.peaks(),
                measured=self.fractions(), sources=self.sources,
            )  # fmt: skip
        except InputError as error:  # absurd figures: the target names itself, and this is its file
            raise InputError(error.what, where=self.where, hint=error.hint) from None

    def refuse(self, what: str, hint: str = _HINT) -> NoReturn:
        raise InputError(what, where=self.where, hint=hint)

    def require_known(self, entries: Iterable[str], known: Iterable[str], within: str) -> None:
        for entry in entries:
            if entry not in known:
                near = difflib.get_close_matches(entry, list(known), n=1)
                self.refuse(
                    f"unknown entry {within + entry!r}", f"did you mean {near[0]}?" if near else _HINT
                )

    def require_one_of(self, entry: str, word: str, known: tuple[str, ...]) -> None:
        if word not in known:
            self.refuse(f"{entry} is {word!r}", f"it is one of {', '.join(known)}")

    def word(self, entry: str, *, empty: bool = False) -> str:
        found = self.data.get(entry)
        if not isinstance(found, str) or not found.isprintable() or not (empty or found.strip()):
            self.refuse(f"{entry} is missing" if found is None else f"{entry} is {found!r}, not a name")
        return found

    def names(self, entry: str) -> tuple[str, ...]:
        found = self.data.get(entry, [])
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            self.refuse(f"{entry} is {found!r}, not a list of names")
        return tuple(found)

    def table(self, entry: str) -> dict[str, Any]:
        found = self.data.get(entry, {})
        if not isinstance(found, dict):
            self.refuse(f"{entry} is {found!r}, not a table")
        return found

    def figure(self, name: str, entry: Any) -> Any:
        """The value of ``{value, source}``; the target judges whether it is absurd."""
        if entry is None:
            self.refuse(f"{name} is missing")
        if not isinstance(entry, dict) or "value" not in entry:
            self.refuse(f"{name} has no value", "write a table with a value and a source")
        self.require_known(entry, ("value", "source"), f"{name}.")
        source = entry.get("source")
        if not isinstance(source, str) or not source.isprintable() or not source.strip():
            self.refuse(f"{name} has no source", "say which data sheet or measurement the figure is from")
        self.sources[name] = source
        return entry["value"]

    def peaks(self) -> dict[str, Any]:
        entries = self.table("peak_flops")
        for dtype in entries:
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                self.refuse(f"peak_flops.{dtype} is not a dtype of torch", "for example peak_flops.bfloat16")
        return {dtype: self.figure(f"peak_flops.{dtype}", entry) for dtype, entry in entries.items()}

    def fractions(self) -> dict[str, float]:
        """Shares of a peak that were measured."""
        found = self.table("measured")
        for name, share in found.items():
            number = isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
            if not number or not 0 < share <= 1:
                self.refuse(f"measured.{name} is {share!r}", "it is a share of a peak, above 0 and at most 1")
        return found
