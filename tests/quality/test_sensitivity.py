"""What each lossy option costs: measured one at a time, kept on disk, checked as a whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from graphwright.cost_model.workload import Budget
from graphwright.ir.errors import InputError, PassError
from graphwright.ir.graph import Graph
from graphwright.optimizer.quality import (
    Calibration,
    Option,
    Quality,
    Sensitivity,
    calibration_text,
    check_combined,
    combine,
    measure_quality,
    measure_sensitivities,
    site_options,
)
from tests.quality.rounded_cache import Lab, RoundCache

LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]


@pytest.fixture(scope="module")
def text(captured_lab: Lab) -> Calibration:
    """Text that the model wrote."""
    return calibration_text(captured_lab.model, None, rows=3, tokens=48)


def measure(lab: Lab, text: Calibration, *bits: int, **options: object) -> dict[tuple[str, str], Sensitivity]:
    """Rounding to each number of bits, at every layer."""
    every = site_options(lab.graph, [RoundCache(b) for b in bits])
    return measure_sensitivities(lab.graph, every, text, make_program=lab.program, **options)  # type: ignore[arg-type]


def test_fewer_bits_lose_more_at_every_site(lab: Lab, text: Calibration) -> None:
    """The loss is real, and grows with every bit that is dropped."""
    found = measure(lab, text, 8, 6, 4, 2)
    assert set(found) == {(s, str(RoundCache(b))) for s in LAYERS for b in (8, 6, 4, 2)}
    for site in LAYERS:
        losses = [found[site, str(RoundCache(b))].kl for b in (8, 6, 4, 2)]
        assert 0 < losses[0] < losses[1] < losses[2] < losses[3]
    assert found[LAYERS[0], "round_cache{bits=2}"].log_perplexity > 0.1


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_sum_over_sites_predicts_the_whole(lab: Lab, text: Calibration, bits: int) -> None:
    """Rounding every layer loses what the layers lose one at a time, within a factor of 1.25."""
    predicted = combine(measure(lab, text, bits).values())
    changed = lab.graph.copy()
    for option in site_options(lab.graph, [RoundCache(bits)]):
        option.apply(changed)
    measured = measure_quality(lab.program(lab.graph), lab.program(changed), text.rows)
    assert 0.8 < measured.kl / predicted.kl < 1.25
    verdict = check_combined(predicted, measured, Budget(kl=2 * measured.kl))
    assert verdict.ok and verdict.ratio == pytest.approx(measured.kl / predicted.kl)


def test_the_exact_graph_is_not_changed(lab: Lab, text: Calibration) -> None:
    """Options are applied to copies."""
    before = str(lab.graph.fx)
    measure(lab, text, 4)
    assert str(lab.graph.fx) == before


# --- what is measured when -----------------------------------------------------------------------


def test_a_second_call_measures_nothing(lab: Lab, text: Calibration) -> None:
    """One lowering for each option and one for the exact program; none when all is known."""
    first = measure(lab, text, 4, 8)
    assert lab.lowered == 2 * 3 + 1
    assert measure(lab, text, 8, 4) == first
    assert lab.lowered == 2 * 3 + 1
    measure(lab, text, 4, 8, 3)
    assert lab.lowered == (2 * 3 + 1) + (3 + 1)


def test_other_text_weights_and_steps_are_measured_again(lab: Lab, text: Calibration) -> None:
    """What an entry depends on is part of its file's name."""
    other_text = calibration_text(lab.model, [list(range(40))])
    first = measure(lab, text, 4)
    assert measure(lab, other_text, 4) != first
    measure(lab, text, 4, step=8)
    assert lab.lowered == 3 * 4
    name = "model.layers.1.mlp.up_proj.weight"
    changed = lab.graph.copy()
    changed.parameters[name] = changed.parameters[name] * 1.5
    options = site_options(changed, [RoundCache(4)])
    other = measure_sensitivities(changed, options, text, make_program=lab.program)
    assert other != first
    assert lab.lowered == 4 * 4


def test_groups_share_one_measurement(lab: Lab, text: Calibration) -> None:
    """Two groups of three layers: two measurements, divided evenly; single ones replace them."""
    found = measure(lab, text, 4, groups=2)
    assert lab.lowered == 2 + 1
    together = [found[site, "round_cache"] for site in LAYERS]
    assert [s.shared for s in together] == [2, 2, 1]
    assert together[0] == together[1]
    single = measure(lab, text, 4)
    assert lab.lowered == (2 + 1) + (2 + 1)  # the last layer was measured by itself already
    assert single[LAYERS[0], "round_cache"].shared == 1
    assert single[LAYERS[2], "round_cache"] == together[2]
    pair = single[LAYERS[0], "round_cache"].kl + single[LAYERS[1], "round_cache"].kl
    assert 2 * together[0].kl == pytest.approx(pair, rel=0.25)
    # What is known in more detail than asked for is not measured again.
    assert measure(lab, text, 4, groups=1) == single
    assert lab.lowered == (2 + 1) + (2 + 1)


def test_an_illegal_site_is_no_option(lab: Lab, text: Calibration) -> None:
    """Only where the pass may apply; groups go by the sites that have it."""
    options = site_options(lab.graph, [RoundCache(4), RoundCache(4, first=2)])
    assert [o.site for o in options] == [*LAYERS, LAYERS[2]]
    found = measure_sensitivities(lab.graph, options, text, make_program=lab.program, groups=1)
    assert {s.shared for (_, name), s in found.items() if name == "round_cache"} == {3}
    assert found[LAYERS[2], "round_cache{first=2}"].shared == 1


def test_layers_restrict_where_and_not_what(lab: Lab, text: Calibration) -> None:
    """A pass that is limited to some layers shares its measurements with the same pass elsewhere."""
    options = site_options(lab.graph, [RoundCache(3, layers="0+2")])
    assert [o.key for o in options] == [(s, "round_cache{bits=3}") for s in (LAYERS[0], LAYERS[2])]
    found = measure_sensitivities(lab.graph, options, text, make_program=lab.program)
    assert found.items() <= measure(lab, text, 3).items()
    assert lab.lowered == (1 + 2) + (1 + 1)


def test_changed_code_is_measured_again(lab: Lab, text: Calibration) -> None:
    """A pass from elsewhere that was edited under the same name has lost its results."""
    options = site_options(lab.graph, [RoundCache(4)])
    measure_sensitivities(lab.graph, options, text, make_program=lab.program)
    assert all(option.version for option in options)
    edited = [replace(option, version="edited") for option in options]
    measure_sensitivities(lab.graph, edited[:1], text, make_program=lab.program)
    assert lab.lowered == (1 + 3) + (1 + 1)


def test_progress_names_what_is_measured(lab: Lab, text: Calibration) -> None:
    """A label and the share that is done, before each measurement."""
    told: list[tuple[str, float]] = []
    measure(lab, text, 4, progress=lambda label, share: told.append((label, share)))
    assert [share for _, share in told] == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert told[1][0] == f"measuring round_cache at {LAYERS[1]}"


def test_an_interruption_keeps_what_was_measured(lab: Lab, text: Calibration) -> None:
    """Ctrl-C before the third measurement: the first two are not made again."""

    def interrupt(label: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(lab, text, 4, progress=interrupt)
    assert lab.lowered == 1 + 2
    found = measure(lab, text, 4)
    assert len(found) == 3 and lab.lowered == (1 + 2) + (1 + 1)


def test_an_option_that_breaks_the_program_is_infinite(lab: Lab, text: Calibration) -> None:
    """And is remembered as such."""
    broken = [Option(LAYERS[0], "break", _spoil_logits)]
    for _ in range(2):
        (found,) = measure_sensitivities(lab.graph, broken, text, make_program=lab.program).values()
        assert found.kl == math.inf
    assert lab.lowered == 2


def _spoil_logits(graph: Graph) -> None:
    (logits,) = graph.output.args[0]  # type: ignore[union-attr,misc]
    graph.output.args = ((graph.emit(torch.ops.aten.mul.Scalar, logits, math.nan),),)


def test_what_cannot_be_measured_is_refused(lab: Lab, text: Calibration) -> None:
    """No groups, no text, a site that is gone; and nothing to do is nothing."""
    with pytest.raises(InputError, match="0 groups"):
        measure(lab, text, 4, groups=0)
    with pytest.raises(InputError, match="no row has two tokens"):
        measure(lab, Calibration([], "generated", ""), 4)
    option = site_options(lab.graph, [RoundCache(4)])[0]
    empty = lab.graph.copy()
    for node in empty.calls("cache_append"):
        empty.fx.erase_node(node)
    with pytest.raises(PassError, match="does not apply any more") as error:
        option.apply(empty)
    assert error.value.where == LAYERS[0]
    assert measure(lab, text) == {}


# --- the whole against its parts -----------------------------------------------------------------


def test_a_kept_budget_is_not_tightened() -> None:
    """Within both bounds, or without any."""
    measured = Quality(kl=0.009, perplexity_ratio=1.002, top1_agreement=0.99, tokens=100)
    for budget in (Budget(kl=0.01), Budget(perplexity=1.01), Budget(kl=0.009, perplexity=1.002), Budget()):
        verdict = check_combined(Sensitivity(0.006, 0.001), measured, budget)
        assert verdict.ok and verdict.tighten == 1.0
        assert verdict.ratio == pytest.approx(1.5)
        assert verdict.bounds(budget)["kl"] == budget.kl
    assert "0.009" in verdict.reason and "budget" not in verdict.reason


def test_an_exceeded_budget_is_tightened_by_what_was_underestimated() -> None:
    """Losses that were predicted 1.5 times too small: the bound shrinks by that, and excludes the choice."""
    predicted, budget = Sensitivity(0.008, 0.004), Budget(kl=0.01, perplexity=1.01)
    verdict = check_combined(predicted, Quality(0.012, math.exp(0.005), 0.9, 100), budget)
    assert not verdict.ok and verdict.tighten == pytest.approx(2 / 3)
    bounds = verdict.bounds(budget)
    assert bounds["kl"] == pytest.approx(0.01 / 1.5) and bounds["kl"] < predicted.kl
    assert bounds["perplexity"] == pytest.approx(1.01 ** (2 / 3))
    assert "KL budget is 0.01" in verdict.reason and "perplexity budget" not in verdict.reason


def test_an_exceeded_perplexity_is_tightened_in_nats() -> None:
    """A ratio has no factor of its own: its logarithm has."""
    predicted, budget = Sensitivity(0.001, math.log(1.009)), Budget(perplexity=1.01)
    verdict = check_combined(predicted, Quality(0.5, 1.03, 0.9, 100), budget)
    assert not verdict.ok and verdict.tighten == pytest.approx(math.log(1.009) / math.log(1.03))
    bounds = verdict.bounds(budget)
    assert bounds["kl"] is None
    assert 1.0 < bounds["perplexity"] < 1.009


@pytest.mark.parametrize("predicted", [Sensitivity(0.0, 0.0), Sensitivity(0.0, -0.01)])
@pytest.mark.parametrize("measured", [Quality(0.5, 1.5, 0.5, 9), Quality(math.inf, math.inf, 0.0, 9)])
def test_a_loss_out_of_nothing_leaves_only_the_exact_program(
    predicted: Sensitivity, measured: Quality
) -> None:
    """No factor makes up for a prediction of zero."""
    verdict = check_combined(predicted, measured, Budget(kl=0.01, perplexity=1.01))
    assert not verdict.ok and verdict.tighten == 0.0 and verdict.ratio == math.inf
    assert verdict.bounds(Budget(kl=0.01, perplexity=1.01)) == {"kl": 0.0, "perplexity": 1.0}


def test_nothing_lost_and_nothing_predicted_is_as_predicted() -> None:
    """An exact program."""
    verdict = check_combined(Sensitivity(0.0, 0.0), Quality(0.0, 1.0, 1.0, 100), Budget(kl=0.01))
    assert verdict.ok and verdict.ratio == 1.0
