"""The choice of one option per site and one per program, against trying everything."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from graphwright.ir.errors import BudgetError, InputError
from graphwright.optimizer.choice import (
    Bounds,
    ProgramOption,
    Selection,
    SiteOption,
    choose,
    closest,
    explain,
    integer_program,
    runners_up,
)
from tests.planner.enumeration import Problem, everything, excesses, feasible, place, problems, rank

PLAIN = [ProgramOption("plain", 0.001)]
CASES = settings(max_examples=120, deadline=None, derandomize=True)


def option(name: str, seconds: float, memory: float = 0.0, kl: float = 0.0, **more: float) -> SiteOption:
    """An option that takes the same time under every program option."""
    return SiteOption(name, {"plain": seconds, "drafts": seconds}, memory, kl, **more)


def alike(options: list[SiteOption], sites: int) -> dict[str, list[SiteOption]]:
    """Sites with the same options."""
    return {f"layer {i}": options for i in range(sites)}


# --- against trying everything -----------------------------------------------------------------------


@given(problems())
@CASES
def test_choose_finds_the_fastest_within_the_bounds(problem: Problem) -> None:
    found = choose(problem.sites, problem.programs, problem.bounds)
    possible = feasible(problem)
    if not possible:
        assert found is None
        return
    assert found is not None and found.optimal
    (same,) = [s for s in possible if (s.program, s.sites) == (found.program, found.sites)]
    assert found.seconds_per_token == pytest.approx(same.seconds_per_token)
    assert found.memory_bytes == same.memory_bytes
    assert found.kl == pytest.approx(same.kl)
    assert found.perplexity == pytest.approx(same.perplexity)
    best = min(rank(s, problem) for s in possible)
    assert rank(found, problem) == best
    assert place(found, problem) == min(place(s, problem) for s in possible if rank(s, problem) == best)


@given(problems())
@CASES
def test_closest_breaks_the_bounds_least(problem: Problem) -> None:
    found = closest(problem.sites, problem.programs, problem.bounds)
    bounds = problem.bounds
    tight = [m for m, b in (("kl", bounds.kl), ("perplexity", bounds.perplexity)) if b in (0.0, 1.0)]
    possible = list(everything(problem))
    for measure in tight:  # a bound without room stays, or is broken as little as can be
        least = max(min(getattr(s, measure) for s in possible), 1.0 if measure == "perplexity" else 0.0)
        possible = [s for s in possible if getattr(s, measure) <= least + 1e-9]
        bounds = replace(bounds, **{measure: None})
    least = min(sum(excesses(s, bounds)) for s in possible)
    assert sum(excesses(found, bounds)) == pytest.approx(least, abs=1e-9)
    near = [s for s in possible if sum(excesses(s, bounds)) <= least + 1e-9]
    assert found.kl == pytest.approx(min(s.kl for s in near), abs=1e-12)
    as_exact = [s for s in near if s.kl <= found.kl + 1e-9]
    assert found.seconds_per_token == pytest.approx(min(s.seconds_per_token for s in as_exact))


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_runners_up_avoid_one_choice_each(problem: Problem) -> None:
    best = choose(problem.sites, problem.programs, problem.bounds)
    if best is None:
        return
    others = runners_up(problem.sites, problem.programs, problem.bounds, best, most=20)
    possible = feasible(problem)
    wanted = [[s for s in possible if s.program != best.program]]
    for name in set(best.sites.values()):
        where = [s for s in best.sites if len(problem.sites[s]) > 1]
        if any(best.sites[s] == name for s in where):
            wanted.append([s for s in possible if all(s.sites[site] != name for site in where)])
    fastest = {rank(min(w, key=lambda s: rank(s, problem)), problem) for w in wanted if w}
    assert {rank(s, problem) for s in others} == fastest
    seconds = [s.seconds_per_token for s in others]
    assert seconds == sorted(seconds)
    choices = {(s.program, tuple(s.sites.items())) for s in (best, *others)}
    assert len(choices) == len(others) + 1
    assert runners_up(problem.sites, problem.programs, problem.bounds, best, most=1) == others[:1]


# --- single properties -------------------------------------------------------------------------------


def test_the_program_option_is_chosen_together_with_the_sites() -> None:
    programs = [ProgramOption("plain", 0.001), ProgramOption("drafts", 0.002, tokens_per_step=2.0)]
    # The fastest option for a step of one token is the slowest for a verification.
    sites = alike(
        [
            SiteOption("narrow", {"plain": 0.001, "drafts": 0.009}, 0.0),
            SiteOption("wide", {"plain": 0.002, "drafts": 0.003}, 0.0),
        ],
        3,
    )
    found = choose(sites, programs, Bounds())
    assert found is not None
    assert (found.program, set(found.sites.values())) == ("plain", {"narrow"})
    assert found.seconds_per_token == pytest.approx(0.004)
    quicker = [programs[0], replace(programs[1], tokens_per_step=4.0)]
    found = choose(sites, quicker, Bounds())
    assert found is not None
    assert (found.program, set(found.sites.values())) == ("drafts", {"wide"})
    assert found.seconds_per_token == pytest.approx((0.002 + 3 * 0.003) / 4)


def test_equal_sites_take_options_in_their_order() -> None:
    options = [option("exact", 0.002), option("lossy", 0.001, kl=0.01)]
    found = choose(alike(options, 5), PLAIN, Bounds(kl=0.02))
    assert found is not None
    assert list(found.sites.values()) == ["exact"] * 3 + ["lossy"] * 2
    assert list(found.sites) == [f"layer {i}" for i in range(5)]


def test_ties_go_to_less_memory_then_quality_then_fewer_names_then_the_earlier_option() -> None:
    def winner(*options: SiteOption, kl: float | None = None) -> str:
        found = choose({"a": list(options)}, PLAIN, Bounds(kl=kl))
        assert found is not None
        return found.sites["a"]

    assert winner(option("large", 0.001, 2e6), option("small", 0.001, 1e6)) == "small"
    assert winner(option("lossy", 0.001, 1e6, 0.01), option("exact", 0.001, 1e6)) == "exact"
    assert winner(option("first", 0.001), option("second", 0.001)) == "first"
    sites = {"a": [option("x", 0.001), option("y", 0.001)], "b": [option("y", 0.001)]}
    found = choose(sites, PLAIN, Bounds())
    assert found is not None and set(found.sites.values()) == {"y"}
    programs = [ProgramOption("plain", 0.001), ProgramOption("drafts", 0.001)]
    found = choose(sites, programs, Bounds())
    assert found is not None and found.program == "plain"


def test_noise_in_the_seconds_does_not_hide_a_tie() -> None:
    noisy = math.nextafter(0.001, 0.0)
    sites = alike([option("large", noisy, 2e6), option("small", 0.001, 1e6)], 3)
    found = choose(sites, PLAIN, Bounds())
    assert found is not None and set(found.sites.values()) == {"small"}


def test_without_sites_the_program_option_is_all() -> None:
    programs = [ProgramOption("plain", 0.002), ProgramOption("drafts", 0.003, 2.0, 1e6)]
    found = choose({}, programs, Bounds())
    assert found == Selection("drafts", {}, 0.0015, 1e6, 0.0, 1.0)
    assert choose({}, programs, Bounds(memory_bytes=1.0)) == Selection("plain", {}, 0.002, 0.0, 0.0, 1.0)


def test_the_same_input_gives_the_same_answer() -> None:
    sites, programs = large(4, sites=12, options=6, programs=3)
    bounds = Bounds(kl=0.003, memory_bytes=9e8)
    first = choose(sites, programs, bounds)
    assert first is not None
    assert [choose(sites, programs, bounds) for _ in range(3)] == [first] * 3


# --- tolerances --------------------------------------------------------------------------------------


def test_by_default_only_exact_options_are_allowed() -> None:
    for kl in (1e-3, 1e-12, 1e-18, 5e-324):
        sites = alike([option("exact", 1.0), option("lossy", 1e-9, kl=kl)], 4)
        found = choose(sites, PLAIN, Bounds())
        assert found is not None and set(found.sites.values()) == {"exact"} and found.kl == 0.0
    found = choose(alike([option("a", 1.0)], 2), [replace(PLAIN[0], kl=1e-15)], Bounds())
    assert found is None


def test_a_perplexity_of_one_allows_no_loss() -> None:
    sites = alike([option("exact", 1.0), option("lossy", 0.1, kl=1e-9, log_perplexity=1e-15)], 3)
    found = choose(sites, PLAIN, Bounds(kl=None, perplexity=1.0))
    assert found is not None and set(found.sites.values()) == {"exact"}


@pytest.mark.parametrize("kl", [0.1, 0.01, 1e-3, 0.7, 1e-7])
@pytest.mark.parametrize("lossy", [1, 3, 7, 29])
def test_a_sum_that_equals_its_bound_is_within_it(kl: float, lossy: int) -> None:
    sites = alike([option("exact", 0.002), option("lossy", 0.001, kl=kl)], 30)
    for bound in (kl * lossy, sum([kl] * lossy), float(f"{kl * lossy:.12g}")):
        found = choose(sites, PLAIN, Bounds(kl=bound))
        assert found is not None and list(found.sites.values()).count("lossy") == lossy
    just_less = choose(sites, PLAIN, Bounds(kl=kl * lossy * (1 - 1e-9)))
    assert just_less is not None and list(just_less.sites.values()).count("lossy") == lossy - 1


def test_a_kilobyte_in_a_terabyte_counts() -> None:
    small, large_one, huge = 1e12, 1e12 + 1000, 5e12
    options = [option("small", 0.0025, small), option("large", 0.002, large_one), option("huge", 0.0, huge)]
    sites = {f"layer {i}": [replace(o, name=f"{o.name} {i}") for o in options] for i in range(6)}
    for kilobytes in range(7):
        bound = 6 * small + kilobytes * 1000
        for limit, wanted in ((bound, kilobytes), (bound - 1 if kilobytes else bound, max(kilobytes - 1, 0))):
            found = choose(sites, PLAIN, Bounds(memory_bytes=limit))
            assert found is not None and found.memory_bytes == 6 * small + wanted * 1000
    # Both scales at once: one huge option, and kilobytes to the byte beside it.
    found = choose(sites, PLAIN, Bounds(memory_bytes=5 * small + huge + 3000))
    assert found is not None and found.memory_bytes == 5 * small + huge + 3000
    found = choose(sites, PLAIN, Bounds(memory_bytes=5 * small + huge + 2990))
    assert found is not None and found.memory_bytes == 5 * small + huge + 2000


def test_a_kilobyte_in_a_terabyte_breaks_a_tie() -> None:
    sites = {
        f"layer {i}": [option(f"large {i}", 0.001, 1e12 + 1000 * (i + 1)), option(f"small {i}", 0.001, 1e12)]
        for i in range(4)
    }
    found = choose(sites, PLAIN, Bounds())
    assert found is not None and found.memory_bytes == 4e12


# --- budgets that nothing meets ----------------------------------------------------------------------


def test_an_unmeetable_budget_has_no_selection_but_a_closest_one() -> None:
    sites = alike([option("exact", 0.002, 8e6), option("lossy", 0.001, 2e6, kl=0.01)], 4)
    bounds = Bounds(memory_bytes=4e6, kl=0.02)
    assert choose(sites, PLAIN, bounds) is None
    found = closest(sites, PLAIN, bounds)
    # Four lossy layers: kl 100 % above, memory 100 % above. Two: 0 % and 400 %.
    assert list(found.sites.values()) == ["lossy"] * 4
    # Where no loss is allowed at all, the closest plan has none.
    found = closest(sites, PLAIN, replace(bounds, kl=0.0))
    assert list(found.sites.values()) == ["exact"] * 4 and found.memory_bytes == 32e6


def test_without_an_exact_option_the_closest_loses_least() -> None:
    sites = alike([option("bad", 0.001, kl=0.5), option("fair", 0.002, kl=0.1)], 2)
    assert choose(sites, PLAIN, Bounds()) is None
    found = closest(sites, PLAIN, Bounds())
    assert list(found.sites.values()) == ["fair", "fair"] and found.kl == pytest.approx(0.2)


def test_a_budget_that_can_be_met_is_met_by_the_closest() -> None:
    sites = alike([option("exact", 0.002, 2e6), option("lossy", 0.001, 1e6, kl=0.01)], 4)
    found = closest(sites, PLAIN, Bounds(memory_bytes=7e6, kl=0.04))
    assert list(found.sites.values()) == ["exact"] * 3 + ["lossy"]


# --- size --------------------------------------------------------------------------------------------


def large(
    seed: int, *, sites: int, options: int, programs: int
) -> tuple[dict[str, list[SiteOption]], list[ProgramOption]]:
    """Sites that are all different, with options from exact and slow to lossy and fast."""
    draw = random.Random(seed)
    names = ["plain"] + [f"drafts {i}" for i in range(1, programs)]
    many = [ProgramOption(names[0], 1e-3)]
    many += [
        ProgramOption(n, draw.uniform(1e-3, 2e-3), draw.uniform(1, 2), draw.uniform(0, 1e7))
        for n in names[1:]
    ]

    def one(index: int) -> SiteOption:
        loss = index / options
        saved = 1 - 0.7 * loss * draw.uniform(0.8, 1.2)
        kl = 1e-3 * loss**2 * draw.uniform(0.3, 3)
        seconds = {n: 5e-4 * saved * draw.uniform(1, 1.5) for n in names}
        return SiteOption(f"bits {index}", seconds, 1e8 * saved * draw.uniform(0.9, 1.1), kl, kl)

    return {f"layer {s}": [one(i) for i in range(options)] for s in range(sites)}, many


def test_eighty_different_layers_thirty_options_ten_programs() -> None:
    sites, programs = large(2, sites=80, options=30, programs=10)
    loose = choose(sites, programs, Bounds(kl=0.01))
    assert loose is not None and loose.optimal and 0 < loose.kl <= 0.01
    exact = choose(sites, programs, Bounds())
    assert exact is not None and exact.kl == 0.0 and set(exact.sites.values()) == {"bits 0"}
    assert loose.seconds_per_token < exact.seconds_per_token


def test_a_solver_that_stops_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, programs = large(3, sites=40, options=12, programs=1)
    bounds = Bounds(kl=0.01, memory_bytes=2.191e9)
    proven = choose(sites, programs, bounds)
    monkeypatch.setitem(integer_program._LIMITS, "node_limit", 1)
    early = choose(sites, programs, bounds)
    assert proven is not None and proven.optimal
    assert early is not None and not early.optimal
    assert early.kl <= 0.01 and early.memory_bytes <= 2.191e9
    assert early.seconds_per_token >= proven.seconds_per_token
    monkeypatch.setitem(integer_program._LIMITS, "time_limit", 0.0)
    with pytest.raises(BudgetError, match="stopped without a selection"):
        choose(sites, programs, bounds)


def test_more_room_is_never_slower() -> None:
    sites, programs = large(3, sites=20, options=8, programs=3)
    found = [
        choose(sites, programs, Bounds(kl=kl, memory_bytes=1.9e9)) for kl in (0.0, 0.001, 0.003, 0.01, None)
    ]
    seconds = [math.inf if s is None else s.seconds_per_token for s in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] < seconds[1] < math.inf


# --- words -------------------------------------------------------------------------------------------


def test_explain_says_what_the_other_costs() -> None:
    best = Selection("plain", {}, 0.010, 500 * 2**20, 0.0, 1.0)
    slower = replace(best, seconds_per_token=0.0114, memory_bytes=380 * 2**20)
    assert explain(best, slower) == "1.4 ms a token slower, 120 MiB less"
    lossy = replace(best, seconds_per_token=0.008, memory_bytes=501 * 2**20, kl=0.0031)
    assert explain(best, lossy) == "2 ms a token faster, 1 MiB more, 0.0031 nats a token further from exact"
    assert explain(lossy, best).endswith("0.0031 nats a token closer to exact")
    assert explain(best, best) == "equal in time, memory and quality, and not preferred"


# --- bad input ---------------------------------------------------------------------------------------

GOOD = option("exact", 0.001)


@pytest.mark.parametrize(
    ("sites", "programs", "named"),
    [
        ({"a": []}, PLAIN, "a site has no option"),
        ({"a": [GOOD, GOOD]}, PLAIN, "two options are called 'exact'"),
        ({"a": [GOOD]}, [], "no program option"),
        ({"a": [GOOD]}, PLAIN * 2, "two options are called 'plain'"),
        ({"a": [GOOD]}, [ProgramOption("tree", 0.001)], "no price under the program option tree"),
        ({"a": [option("x", -0.001)]}, PLAIN, "seconds under plain is -0.001"),
        ({"a": [option("x", math.nan)]}, PLAIN, "seconds under plain is nan"),
        ({"a": [option("x", 0.001, -1.0)]}, PLAIN, "memory_bytes is -1.0"),
        ({"a": [option("x", 0.001, math.inf)]}, PLAIN, "memory_bytes is inf"),
        ({"a": [option("x", 0.001, kl=-1e-9)]}, PLAIN, "kl is -1e-09"),
        ({"a": [option("x", 0.001, log_perplexity=math.inf)]}, PLAIN, "log_perplexity is inf"),
        ({"a": [GOOD]}, [ProgramOption("plain", -1.0)], "seconds is -1.0"),
        ({"a": [GOOD]}, [ProgramOption("plain", 0.1, 0.0)], "tokens_per_step of 0.0"),
        ({"a": [GOOD]}, [ProgramOption("plain", 0.1, math.nan)], "tokens_per_step of nan"),
        ({"a": [GOOD]}, [ProgramOption("plain", 0.1, memory_bytes=-1)], "memory_bytes is -1"),
        ({"a": [GOOD]}, [ProgramOption("plain", None)], "seconds is None"),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense_are_refused(sites: Any, programs: Any, named: str) -> None:
    for call in (choose, closest):
        with pytest.raises(InputError, match=named) as error:
            call(sites, programs, Bounds())
        assert error.value.where and error.value.hint


@pytest.mark.parametrize(
    "bound",
    [
        {"memory_bytes": 0}, {"memory_bytes": -1.0}, {"seconds_per_token": 0.0}, {"kl": -0.1},
        {"kl": math.nan}, {"perplexity": 0.99}, {"perplexity": math.inf}, {"memory_bytes": "4GiB"},
        {"kl": True},
    ],
)  # fmt: skip
def test_bounds_that_nothing_could_meet_are_refused(bound: dict[str, Any]) -> None:
    (name,) = bound
    with pytest.raises(InputError, match=f"{name} of") as error:
        Bounds(**bound)
    assert error.value.where == f"bounds.{name}" and error.value.hint


def test_a_loss_that_was_measured_as_a_gain_is_allowed() -> None:
    sites = alike([option("exact", 0.002), option("lucky", 0.001, kl=1e-3, log_perplexity=-1e-4)], 2)
    found = choose(sites, PLAIN, Bounds(kl=0.01, perplexity=1.0))
    assert found is not None and set(found.sites.values()) == {"lucky"}
    assert found.perplexity == pytest.approx(math.exp(-2e-4))
