"""Which layers to leave out for which kind of text: found once on samples, kept in a small file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.program import Program
from graphwright.runtime.residual import ResidualStream
from graphwright.runtime.storage import MAX_STEP_TOKENS


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: for people.
        anchor: ``[H]`` mean of its texts' last hidden states.
        skip: the layers to leave out; the beginning of the list is what to leave out if it is to be fewer.
        match: share of its tokens that the rest of the layers predict as all of them do.
    """

    name: str
    anchor: tuple[float, ...]
    skip: tuple[int, ...]
    match: float


class _Judge:
    """Compares the program without some layers to the whole of it, on the beginnings of texts."""

    def __init__(self, program: Program, texts: Sequence[Sequence[int]]) -> None:
        self._program = program
        rows = [list(text[:MAX_STEP_TOKENS]) for text in texts]
        width = max(map(len, rows))
        self._counts = torch.tensor([len(row) for row in rows], device=program.device)
        self._tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=program.device)
        self._valid = torch.arange(width, device=program.device) < self._counts[:, None]  # [B, T]
        self._state = program.allocate(len(rows), width)
        stream = ResidualStream()
        logits = program.step(self._state, self._tokens, self._counts, visit=stream)
        self._whole = logits.argmax(-1)
        self.anchor = stream.kept[-1][self._valid].float().mean(0)

    def match(self, skip: frozenset[int]) -> float:
        logits = self._program.step(self._state, self._tokens, self._counts, skip=skip)
        return float((logits.argmax(-1) == self._whole)[self._valid].float().mean())


def calibrate_skips(
    program: Program, domains: Mapping[str, Sequence[Sequence[int]]], count: int
) -> list[Domain]:
    """For each domain, ``count`` layers to leave out: one by one, each time the one that costs least.

    Args:
        program: with layers that can be left out.
        domains: texts (token ids) by the name of their kind; their first 64 tokens are used.
        count: layers to leave out.

    Raises:
        InputError: the program has not so many layers that can be left out, or a domain has no text.
    """
    layers = list(program.lowered.blocks.found)
    if not 0 < count < len(layers):
        raise InputError(
            f"count={count} of {len(layers)} layers that can be left out", where="calibrate_skips",
            hint=f"1 to {len(layers) - 1}" if len(layers) > 1 else "another program",
        )  # fmt: skip
    found = []
    for name, texts in domains.items():
        if not texts or not all(texts):
            raise InputError(f"domain {name} has no text, or an empty one", where="calibrate_skips")
        judge, skip, match = _Judge(program, texts), list[int](), 1.0
        for _ in range(count):
            scores = {layer: judge.match(frozenset({*skip, layer})) for layer in layers if layer not in skip}
            best = max(scores, key=lambda layer: scores[layer])
            skip, match = [*skip, best], scores[best]
        found.append(Domain(name, tuple(judge.anchor.tolist()), tuple(skip), match))
    return found


def save_domains(domains: Sequence[Domain], path: str | Path) -> None:
    """Write domains as JSON."""
    Path(path).write_text(json.dumps([asdict(domain) for domain in domains]) + "\n")


def load_domains(path: str | Path) -> list[Domain]:
    """Read what :func:`save_domains` wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        found = [
            Domain(str(one["name"]), tuple(map(float, one["anchor"])), tuple(map(int, one["skip"])),
                   float(one["match"]))
            for one in json.loads(Path(path).read_text())
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no layers to leave out ({type(error).__name__}: {error})",
            where="load_domains",
            hint="write it with save_domains(calibrate_skips(...), path)",
        ) from error
    if not found or len({len(one.anchor) for one in found}) != 1:
        raise InputError(f"{path} has no domains, or anchors of several sizes", where="load_domains")
    return found
