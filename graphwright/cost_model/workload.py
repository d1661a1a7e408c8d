"""What will run, and what it may cost: the two arguments a caller describes a job with."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from graphwright.ir.errors import InputError

_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | float | str, *, where: str = "memory") -> int:
    """``"40GiB"``, ``"512 MiB"``, ``"40GB"`` (decimal) or a plain number, as bytes.

    Raises:
        InputError: not a size, not finite, or not above zero.
    """
    hint = 'give bytes as a number, or a string such as "40GiB" or "512MiB"'
    number, unit = size, "B"
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None or (match[2] or "B").upper() not in _UNITS:
            raise InputError(f"{size!r} is not a size", where=where, hint=hint)
        number, unit = float(match[1]), (match[2] or "B").upper()
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise InputError(f"{size!r} is not a size", where=where, hint=hint)
    result = int(number * _UNITS[unit])
    if result <= 0:
        raise InputError(f"a size must be above zero, not {size!r}", where=where, hint=hint)
    return result


@dataclass(frozen=True)
class Workload:
    """What will run.

    Args:
        batch: sequences decoded together.
        prompt: prompt tokens per sequence.
        generate: new tokens per sequence.
        shared_prefix: how many of the prompt's tokens are the same in every sequence.

    Raises:
        InputError: a number that is not a positive integer, or a prefix longer than the prompt.
    """

    batch: int = 1
    prompt: int = 1024
    generate: int = 256
    shared_prefix: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("generate", 1), ("shared_prefix", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputError(
                    f"{name} must be an integer of at least {least}, not {number!r}",
                    where=f"Workload({name}=...)",
                    hint="for example Workload(batch=1, prompt=1024, generate=256)",
                )
        if self.shared_prefix > self.prompt:
            raise InputError(
                f"a shared prefix of {self.shared_prefix} tokens is longer than the prompt of {self.prompt}",
                where="Workload(shared_prefix=...)",
                hint="the prefix is a part of the prompt",
            )

    @property
    def capacity(self) -> int:
        """Tokens per sequence that the cache holds in the end: prompt and generated."""
        return self.prompt + self.generate

    @property
    def mean_context(self) -> float:
        """Tokens in the cache before a decode step, averaged over the steps.

        The first new token comes from the prefill; step i of the other ``generate - 1`` finds
        ``prompt + i`` tokens in the cache, i from 0.
        """
        return self.prompt + max(self.generate - 2, 0) / 2

    @property
    def decode_steps(self) -> int:
        """Decode steps per sequence without speculation: the prefill yields the first token."""
        return self.generate - 1


@dataclass(frozen=True)
class Budget:
    """What a program may lose and take; None is no bound, and no loss of quality is allowed by default.

    Args:
        kl: mean Kullback-Leibler divergence from the original model per token, in nats.
        perplexity: ratio to the original model's perplexity; 1.01 is one per cent more.
        memory: peak memory, bytes or a string such as ``"40GiB"``.
        latency: seconds per decoded token.

    Raises:
        InputError: a bound that is not a finite number above zero (perplexity: at least 1).
    """

    kl: float | None = None
    perplexity: float | None = None
    memory: int | str | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("kl", "latency", "perplexity"):
            bound = getattr(self, name)
            if bound is None:
                continue
            number = not isinstance(bound, bool) and isinstance(bound, (int, float)) and math.isfinite(bound)
            if not number or bound <= 0:
                raise InputError(
                    f"{name} must be a finite number above zero, not {bound!r}",
                    where=f"Budget({name}=...)",
                    hint="leave it out for no bound; exact programs need no quality budget",
                )
        if self.perplexity is not None and self.perplexity < 1:
            raise InputError(
                f"perplexity is a ratio to the original model's, at least 1, not {self.perplexity!r}",
                where="Budget(perplexity=...)",
                hint="1.01 allows one per cent more",
            )
        if self.memory is not None:
            parse_bytes(self.memory, where="Budget(memory=...)")

    @property
    def memory_bytes(self) -> int | None:
        """The bound on memory in bytes, or None."""
        return None if self.memory is None else parse_bytes(self.memory, where="Budget(memory=...)")

    @property
    def allows_loss(self) -> bool:
        """Whether a rewrite that changes what the model computes may run at all."""
        return self.kl is not None or self.perplexity is not None
