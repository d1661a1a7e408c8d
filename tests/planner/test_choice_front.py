"""The front of quality against speed, against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings

from graphwright.ir.errors import InputError
from graphwright.optimizer.choice import Bounds, ProgramOption, Selection, SiteOption, choose, front
from tests.planner.enumeration import Problem, beats, feasible, problems

PLAIN = [ProgramOption("plain", 0.001)]


def ladder(sites: int, steps: int, *, lossy: bool = True) -> dict[str, list[SiteOption]]:
    """Different layers, whose options get faster and lossier (or faster and larger)."""
    return {
        f"layer {s}": [
            SiteOption(
                f"bits {16 - i}",
                {"plain": (1.0 + 0.1 * s) * 1e-3 / (1 + i)},
                1e6 * (steps - i if lossy else 1 + i),
                1e-3 * i**2 * (1 + 0.3 * s) if lossy else 0.0,
            )
            for i in range(steps)
        ]
        for s in range(sites)
    }


def monotone(found: list[Selection], axis: str) -> bool:
    """Whether each next selection is slower, and better on the axis."""
    pairs = list(itertools.pairwise(found))
    return all(
        a.seconds_per_token < b.seconds_per_token and getattr(a, axis) > getattr(b, axis) for a, b in pairs
    )


@given(problems())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_front_is_of_selections_that_nothing_beats(problem: Problem) -> None:
    found = front(problem.sites, problem.programs, problem.bounds)
    best = choose(problem.sites, problem.programs, problem.bounds)
    possible = feasible(problem)
    if best is None:
        assert found == [] == possible
        return
    assert found[0] == best
    assert 1 <= len(found) <= 8
    seconds = [s.seconds_per_token for s in found]
    assert seconds == sorted(seconds)
    for selection in found:
        rivals = [s for s in possible if s.kl <= best.kl + 1e-12] if best.kl == found[-1].kl else possible
        assert not any(beats(rival, selection) for rival in rivals)
    assert len({(s.program, tuple(s.sites.items())) for s in found}) == len(found)
    least = min(s.kl for s in possible)
    assert found[-1].kl == pytest.approx(least, abs=1e-12)


def test_quality_against_speed_with_both_ends() -> None:
    sites = ladder(6, 5)
    bounds = Bounds(kl=0.05)
    found = front(sites, PLAIN, bounds)
    assert len(found) == 8 and monotone(found, "kl")
    assert found[0] == choose(sites, PLAIN, bounds)
    assert found[-1] == choose(sites, PLAIN, Bounds(kl=0.0)) and found[-1].kl == 0.0
    assert all(s.kl <= 0.05 for s in found)
    assert front(sites, PLAIN, bounds) == found


def test_where_everything_is_exact_memory_stands_against_speed() -> None:
    found = front(ladder(5, 4, lossy=False), PLAIN, Bounds())
    assert len(found) == 8 and monotone(found, "memory_bytes")
    assert found[-1].memory_bytes == 5e6
    assert set(found[0].sites.values()) == {"bits 13"}
    bounded = front(ladder(5, 4, lossy=False), PLAIN, Bounds(memory_bytes=10e6))
    assert bounded[0].memory_bytes <= 10e6 and monotone(bounded, "memory_bytes")


def test_every_point_of_a_small_front_is_found() -> None:
    sites = {f"layer {s}": o for s, o in enumerate([ladder(1, 3)["layer 0"]] * 2)}
    everything = Problem(sites, PLAIN, Bounds(kl=None))
    possible = feasible(everything)
    wanted = {
        round(s.kl, 9)
        for s in possible
        if not any(r.kl <= s.kl and r.seconds_per_token < s.seconds_per_token for r in possible)
    }
    found = front(sites, PLAIN, Bounds(kl=None), points=20)
    assert {round(s.kl, 9) for s in found} == wanted and len(found) == len(wanted) > 3


def test_the_points_spread_over_the_front() -> None:
    found = front(ladder(10, 6), PLAIN, Bounds(kl=None), points=6)
    assert len(found) == 6
    span = found[-1].seconds_per_token - found[0].seconds_per_token
    gaps = [b.seconds_per_token - a.seconds_per_token for a, b in itertools.pairwise(found)]
    assert max(gaps) < 0.6 * span


def test_two_points_are_the_ends_and_fewer_are_refused() -> None:
    sites = ladder(4, 4)
    found = front(sites, PLAIN, Bounds(kl=None), points=2)
    assert [s.kl for s in found] == [found[0].kl, 0.0] and len(found) == 2
    with pytest.raises(InputError, match="a front of 1 points"):
        front(sites, PLAIN, Bounds(), points=1)


def test_one_selection_is_a_front_of_one() -> None:
    sites = {"a": [SiteOption("exact", {"plain": 0.001}, 1e6)]}
    assert front(sites, PLAIN, Bounds()) == [choose(sites, PLAIN, Bounds())]
    assert front(sites, PLAIN, Bounds(memory_bytes=1.0)) == []
