"""``decay_depth`` and ``exit_early``: which layer serves which token, and where they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model.workload import Workload
from graphwright.ir.depth_ops import PROMPT_LENGTHS
from graphwright.ir.errors import PassError
from graphwright.ir.graph import argument
from graphwright.ir.serialize import graph_from_json, graph_to_json
from graphwright.ir.verifier import verify
from graphwright.passes.base import order_passes, parse_pass
from graphwright.passes.decay_depth import DecayDepth
from graphwright.passes.exit_early import ExitEarly
from graphwright.runtime.depth import DepthLimits
from graphwright.runtime.lowering.early_exit import rest_of
from tests.rewrite.cached_programs import TARGET, largest_difference, program, rewrite

KV = "place_cache{cut=kv}"


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 40), alpha=st.floats(0.5, 0.9999), start=st.integers(0, 9),
    first=st.integers(0, 8), last=st.integers(0, 4), least=st.integers(0, 45),
)  # fmt: skip
def test_limits_are_the_rule(
    layers: int, alpha: float, start: int, first: int, last: int, least: int
) -> None:
    """Token i uses ``floor(L alpha^i)`` layers: all but a run of them in the middle."""
    numbers = [3 * n for n in range(layers)]  # as they are where others were skipped
    found = DecayDepth(alpha=alpha, start=start, first=first, last=last, least=least).limits(numbers)
    for index in range(0, 400, 7):
        kept = max(math.floor(layers * alpha ** max(index - start, 0)), min(layers, max(first + last, least)))
        behind = max(layers - last, first)
        middle = numbers[first:behind]
        dropped = layers - kept
        run = middle[(len(middle) - dropped + 1) // 2 :][:dropped]
        used = set(numbers) - set(run)
        assert {n for n in numbers if index <= found.get(n, index)} == used
        assert len(used) == kept
        assert DepthLimits(found).idle([index + 9], [10], None) == set(numbers) - used


def test_the_host_knows_which_layers_are_idle() -> None:
    limits = DepthLimits({2: 5, 3: 1})
    assert limits.idle([12, 30], [10, 10], None) == {3}  # tokens 3 and 21
    assert limits.idle([12, 30], [10, 10], [1]) == {2, 3}
    assert limits.idle([12, 30], [10, 10], []) == set()
    assert limits.idle([7], [10], None) == set()


@pytest.mark.parametrize("text", ["decay_depth{alpha=0.5,first=1,last=1}", "exit_early{layer=1,threshold=0}"])
def test_prompts_stay_exact(captured: Any, text: str) -> None:
    """As long as the prompt has not ended, the program is the stock model."""
    found = captured("llama", layers=3)
    graph, records = rewrite(found, KV, text)
    assert records[-1].status == "applied", records[-1].reason
    (joined,) = graph.calls("bypass")
    assert argument(joined, "exit").meta["nn_module_stack"] == joined.meta["nn_module_stack"]
    runs: Any = _Unending(program(found.model, graph))
    assert largest_difference(found.model, runs, steps=(1, 3)) < 1e-4


class _Unending:
    """A program whose prompts do not end."""

    def __init__(self, runs: Any) -> None:
        self._runs = runs
        self.allocate, self.step = runs.allocate, runs.step

    def prefill(self, state: Any, *given: Any) -> torch.Tensor:
        state.end_prompt([100] * state.batch)
        result: torch.Tensor = self._runs.prefill(state, *given)
        return result


def test_it_is_saved_with_the_graph(captured: Any) -> None:
    found = captured("llama", layers=3)
    graph, _ = rewrite(found, KV, "decay_depth{alpha=0.5,first=1,last=1}")
    again = graph_from_json(graph_to_json(graph), graph.parameters, found.model.device)
    verify(again, deep=True)
    assert again.annotations["depth"] == {"1": 0} and again.placeholder(PROMPT_LENGTHS)
    assert program(found.model, again).lowered.depth == {1: 0}


def test_the_price_is_the_mean_depth(captured: Any) -> None:
    """Layer 1 of 3 serves tokens up to 1, layer 2 none but the prompt's."""
    graph, _ = rewrite(captured("llama", layers=3), KV)
    chosen = DecayDepth(alpha=0.8, first=1, last=0)
    (site,) = chosen.find(graph)
    assert site.info["limits"] == {2: 0, 1: 1}
    near = chosen.gain(site, Workload(generate=5), TARGET)
    assert near.note == "1.2 of 3 layers on average over 4 steps"  # 2, 1, 1 and 1
    far = chosen.gain(site, Workload(generate=500), TARGET)
    assert far.seconds_per_token < near.seconds_per_token < 0 and far.memory_bytes == 0


def test_the_price_of_an_exit(captured: Any) -> None:
    """A step saves what the layers above do beside keys and values, if all of its rows exit."""
    graph, _ = rewrite(captured("llama", layers=3), KV)
    (site,) = ExitEarly(layer=0).find(graph)

    def seconds(rate: float, batch: int) -> float:
        return ExitEarly(layer=0, rate=rate).gain(site, Workload(batch=batch), TARGET).seconds_per_token

    assert seconds(0.0, 1) > 0 > seconds(1.0, 1)
    assert seconds(0.5, 1) == pytest.approx((seconds(0.0, 1) + seconds(1.0, 1)) / 2)
    assert seconds(0.5, 2) == pytest.approx(0.75 * seconds(0.0, 2) + 0.25 * seconds(1.0, 2))


def test_what_is_left_of_layers_that_all_tokens_pass_by(captured: Any) -> None:
    graph, _ = rewrite(captured("llama", layers=3), KV, "exit_early{layer=0}")
    rest = rest_of(graph)
    counts = rest.counts()
    assert counts == {"rms_norm": 2, "linear": 4, "rotary": 2, "cache_append": 4}
    stores = {f"model.layers.{layer}.self_attn.{part}" for layer in (1, 2) for part in ("keys", "values")}
    assert {node.meta["name"] for node in rest.placeholders("state")} == stores


def test_it_comes_after_what_rewrites_layers() -> None:
    chosen = [parse_pass(text) for text in ("decay_depth", "quantize_cache", KV, "skip_layers{count=1}")]
    assert order_passes(chosen)[-1] is chosen[0]
    assert DecayDepth.variants() == ExitEarly.variants() == []


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ([KV, "decay_depth"], "every token uses all 3 layers"),
        ([KV, "decay_depth{first=1,last=1}", "decay_depth{first=1,last=1,alpha=0.5}"], "already"),
        ([KV, "decay_depth{first=1,last=1}", "exit_early{layer=1}"], "already"),
        ([KV, "exit_early{layer=2}"], "no layer 2 with another one above it"),
        ([KV, "exit_early{layer=7}"], "no layer 7"),
    ],
)
def test_refused(captured: Any, passes: list[str], reason: str) -> None:
    _, records = rewrite(captured("llama", layers=3), *passes)
    assert records[-1].status == "illegal" and reason in records[-1].reason


def test_layers_that_read_each_others_caches_are_refused(captured: Any) -> None:
    graph, _ = rewrite(captured("llama", layers=3), KV)
    one, two = graph.calls("cache_attention")[1:]
    two.replace_input_with(argument(two, "keys"), argument(one, "keys"))
    chosen = DecayDepth(first=1, last=1)
    (site,) = chosen.find(graph)
    verdict = chosen.legal(site)
    assert not verdict.ok and "layer 1 cannot be left out" in verdict.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decay_depth{alpha=1.0}", "alpha=1.0"),
        ("decay_depth{alpha=0}", "alpha=0.0"),
        ("decay_depth{first=-1}", "first=-1 is negative"),
        ("decay_depth{start=-2}", "start=-2 is negative"),
        ("decay_depth{least=half}", "not a value"),
        ("decay_depth{layers=3}", "no option 'layers'"),
        ("exit_early{layer=-1}", "layer=-1 is no layer"),
        ("exit_early{threshold=1.5}", "threshold=1.5 is out of range"),
        ("exit_early{rate=-0.5}", "rate=-0.5 is out of range"),
        ("exit_early{measure=mean}", "no measure 'mean'"),
    ],
)
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pass(text)
