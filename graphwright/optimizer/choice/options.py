"""What can be chosen, within what, and what was: plain numbers, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class SiteOption:
    """One way to run one site (a layer).

    Attributes:
        name: what the option is, such as ``place_cache{cut=kv}``.
        seconds: of one step at this site, by the name of the program option.
        memory_bytes: what it keeps in memory, at most.
        kl: nats per token that it adds to the divergence from the exact program; 0 is exact.
        log_perplexity: natural logarithm of the ratio that it multiplies the perplexity by. May be below
            zero, since it was measured on a finite text.
        memory_under: what it keeps by the name of the program option, where that makes a difference.
    """

    name: str
    seconds: Mapping[str, float]
    memory_bytes: float
    kl: float = 0.0
    log_perplexity: float = 0.0
    memory_under: Mapping[str, float] = field(default_factory=dict)

    def kept(self, program: str) -> float:
        """Bytes in memory under a program option."""
        return self.memory_under.get(program, self.memory_bytes)


@dataclass(frozen=True)
class ProgramOption:
    """One choice for the whole program.

    Attributes:
        name: what the option is: ``plain``, or ``speculate{drafter=ngram,tokens=4}``.
        seconds: of one step outside of the sites, drafting included.
        tokens_per_step: expected tokens that a row gains in a step.
        memory_bytes, kl, log_perplexity: as those of a site.
    """

    name: str
    seconds: float
    tokens_per_step: float = 1.0
    memory_bytes: float = 0.0
    kl: float = 0.0
    log_perplexity: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """What a selection may cost; None is no bound.

    Attributes:
        memory_bytes: of the program option and all sites, above 0.
        seconds_per_token: above 0.
        kl: nats per token, summed over the choices. 0, the default, allows options of kl 0 only.
        perplexity: ratio to the exact program's, at least 1.

    Raises:
        InputError: a bound that is not a number or that nothing could meet.
    """

    memory_bytes: float | None = None
    seconds_per_token: float | None = None
    kl: float | None = 0.0
    perplexity: float | None = None

    def __post_init__(self) -> None:
        for name, least, allowed in (
            ("memory_bytes", 0.0, False),
            ("seconds_per_token", 0.0, False),
            ("kl", 0.0, True),
            ("perplexity", 1.0, True),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value) or value < least or (value == least and not allowed):
                raise InputError(
                    f"{name} of {value!r} is not a bound",
                    where=f"bounds.{name}",
                    hint=f"give a number {'of at least' if allowed else 'above'} {least:g}, or None",
                )

    def limits(self) -> dict[str, float]:
        """The bounds there are, by the measure that they bound (see ``problem.MEASURES``)."""
        by_measure = {
            "seconds": self.seconds_per_token,
            "memory": self.memory_bytes,
            "kl": self.kl,
            "log_perplexity": None if self.perplexity is None else math.log(self.perplexity),
        }
        return {measure: float(limit) for measure, limit in by_measure.items() if limit is not None}


@dataclass(frozen=True)
class Selection:
    """One option for every site and one for the program.

    Attributes:
        program: name of the program option.
        sites: name of the option, by site.
        seconds_per_token: (program + sites) seconds of a step, divided by the tokens that it yields.
        memory_bytes, kl: sums over the choices.
        perplexity: ratio to the exact program's.
        optimal: False if the solver could not prove it the best: it stopped at a limit with what it had
            found, or the figures lie closer together than it can tell apart.
    """

    program: str
    sites: Mapping[str, str]
    seconds_per_token: float
    memory_bytes: float
    kl: float
    perplexity: float
    optimal: bool = True


def check_options(sites: Mapping[str, Sequence[SiteOption]], programs: Sequence[ProgramOption]) -> None:
    """Refuse what cannot be chosen from.

    Raises:
        InputError: no program option; a site without options; a name used twice; an option without a price
            for some program option; a number that is not finite, or negative where that makes no sense.
    """
    if not programs:
        raise InputError(
            "there is no program option",
            where="programs",
            hint='give at least one, ProgramOption("plain", 0.0)',
        )
    _check_names([p.name for p in programs], "programs")
    for program in programs:
        where = f"programs: {program.name}"
        _check_numbers(where, program.memory_bytes, program.kl, program.log_perplexity)
        _check_number("seconds", program.seconds, where)
        if not _is_number(program.tokens_per_step) or program.tokens_per_step <= 0:
            raise InputError(
                f"tokens_per_step of {program.tokens_per_step!r} is not a number of tokens",
                where=where,
                hint="give a number above 0; a step without speculation yields 1",
            )
    for site, options in sites.items():
        if not options:
            raise InputError(
                "a site has no option", where=f"sites: {site}", hint="give at least the exact one"
            )
        _check_names([o.name for o in options], f"sites: {site}")
        for option in options:
            where = f"sites: {site}: {option.name}"
            _check_numbers(where, option.memory_bytes, option.kl, option.log_perplexity)
            for program in programs:
                if program.name not in option.seconds:
                    raise InputError(
                        f"an option has no price under the program option {program.name}",
                        where=where,
                        hint="seconds needs one entry for every program option",
                    )
                _check_number(f"seconds under {program.name}", option.seconds[program.name], where)
                _check_number(f"memory under {program.name}", option.kept(program.name), where)


def _check_names(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"two options are called {name!r}", where=where, hint="give each its own name")
        seen.add(name)


def _check_numbers(where: str, memory_bytes: float, kl: float, log_perplexity: float) -> None:
    _check_number("memory_bytes", memory_bytes, where)
    _check_number("kl", kl, where)
    _check_number("log_perplexity", log_perplexity, where, signed=True)


def _check_number(name: str, value: float, where: str, *, signed: bool = False) -> None:
    if not _is_number(value) or (value < 0 and not signed):
        raise InputError(
            f"{name} is {value!r}",
            where=where,
            hint="give a finite number" if signed else "give a finite number of at least 0",
        )


def _is_number(value: object) -> bool:
    return (
        not isinstance(value, bool)
        and hasattr(value, "__float__")
        and not isinstance(value, str)
        and math.isfinite(value)  # type: ignore[arg-type]
    )
