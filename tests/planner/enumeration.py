"""Small problems of choice, and their answers by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from graphwright.optimizer.choice import Bounds, ProgramOption, Selection, SiteOption

#: Far above what additions in another order change, far below any difference in these problems.
NEAR = 1e-9


@dataclass(frozen=True)
class Problem:
    """The arguments of ``choose``."""

    sites: dict[str, list[SiteOption]]
    programs: list[ProgramOption]
    bounds: Bounds


def everything(problem: Problem) -> Iterator[Selection]:
    """Every selection there is, within the bounds or not."""
    for program in problem.programs:
        for chosen in itertools.product(*problem.sites.values()):
            parts = (program, *chosen)
            seconds = program.seconds + sum(o.seconds[program.name] for o in chosen)
            yield Selection(
                program.name,
                {site: option.name for site, option in zip(problem.sites, chosen, strict=True)},
                seconds / program.tokens_per_step,
                sum(p.memory_bytes for p in parts),
                sum(p.kl for p in parts),
                math.exp(sum(p.log_perplexity for p in parts)),
            )


def excesses(selection: Selection, bounds: Bounds) -> list[float]:
    """How far a selection is above each bound, relative to it; infinite above a bound without any room."""
    pairs = [
        (selection.memory_bytes, bounds.memory_bytes),
        (selection.seconds_per_token, bounds.seconds_per_token),
        (selection.kl, bounds.kl),
        (math.log(selection.perplexity), None if bounds.perplexity is None else math.log(bounds.perplexity)),
    ]
    found = []
    for value, bound in pairs:
        if bound is None or value <= bound * (1 + NEAR):
            found.append(0.0)
        else:
            found.append(value / bound - 1 if bound else math.inf)
    return found


def feasible(problem: Problem) -> list[Selection]:
    """Every selection within the bounds."""
    return [s for s in everything(problem) if not any(excesses(s, problem.bounds))]


def costs(selection: Selection) -> tuple[float, float, float]:
    """Seconds, bytes and nats, without what additions in another order change."""
    return (
        round(selection.seconds_per_token, 9),
        round(selection.memory_bytes, 6),
        round(selection.kl, 9),
    )


def distinct_names(selection: Selection) -> int:
    """How many different options a selection uses at its sites."""
    return len(set(selection.sites.values()))


def rank(selection: Selection, problem: Problem) -> tuple[float, float, float, int]:
    """What ``choose`` minimizes, the last tie left out."""
    return (*costs(selection), distinct_names(selection))


def place(selection: Selection, problem: Problem) -> int:
    """How late the options of a selection stand in the lists that were given."""
    late = [p.name for p in problem.programs].index(selection.program)
    for site, options in problem.sites.items():
        late += [o.name for o in options].index(selection.sites[site])
    return late


def beats(one: Selection, other: Selection) -> bool:
    """Whether a selection is at least as good in time, memory and quality, and better in one of them."""
    return costs(one) != costs(other) and all(a <= b for a, b in zip(costs(one), costs(other), strict=True))


# --- small problems ------------------------------------------------------------------------------


def _options(draw: st.DrawFn, programs: Sequence[str]) -> list[SiteOption]:
    """An exact option first, then lossy and other exact ones; few values, so that there are ties."""
    options = []
    for index in range(draw(st.integers(1, 3))):
        kl = 0.0 if index == 0 else draw(st.sampled_from([0.0, 0.001, 0.002, 0.003, 0.01]))
        options.append(
            SiteOption(
                f"option {index}",
                {p: draw(st.integers(0, 6)) / 1000 for p in programs},
                draw(st.integers(0, 5)) * 1e6,
                kl,
                draw(st.sampled_from([0.0, 0.5, 1.5])) * kl,
            )
        )
    return draw(st.permutations(options))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four sites of up to two kinds, up to three program options, any bounds."""
    names = ["plain", "drafts", "tree"][: draw(st.integers(1, 3))]
    programs = [
        ProgramOption(
            name,
            draw(st.integers(1, 5)) / 1000,
            1.0 if name == "plain" else draw(st.sampled_from([1.0, 1.25, 2.0])),
            draw(st.integers(0, 3)) * 1e6,
            draw(st.sampled_from([0.0, 0.0, 0.001])),
        )
        for name in names
    ]
    kinds = [_options(draw, names) for _ in range(draw(st.integers(1, 2)))]
    sites = {f"layer {i}": draw(st.sampled_from(kinds)) for i in range(draw(st.integers(0, 4)))}
    bounds = Bounds(
        draw(st.sampled_from([None, 1e6, 4e6, 8e6, 12e6])),
        draw(st.sampled_from([None, 0.002, 0.005, 0.01, 0.02])),
        draw(st.sampled_from([None, 0.0, 0.001, 0.003, 0.005, 0.02])),
        draw(st.sampled_from([None, 1.0, math.exp(0.0015), math.exp(0.004), 1.02])),
    )
    return Problem(sites, programs, bounds)
