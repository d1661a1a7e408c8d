from __future__ import annotations

import random

import pytest

from graphwright.cost_model import Cost, expected_tokens, predict_speculation, speculation_speedup
from graphwright.cost_model.cost import B, T
from graphwright.cost_model.speculation import best_drafts
from graphwright.ir.errors import InputError


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("drafts", [0, 1, 4, 9])
def test_the_closed_form(acceptance, drafts):
    closed = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert expected_tokens(acceptance, drafts) == pytest.approx(closed)


def test_the_ends():
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens([0.9, 0.5], 2) == pytest.approx(1 + 0.9 + 0.45)
    assert expected_tokens([0.9, 0.5], 1) == pytest.approx(1.9)


def test_against_drawing():
    chances, draw = [0.9, 0.6, 0.7], random.Random(0)
    total, cycles = 0, 20_000
    for _ in range(cycles):
        accepted = next((i for i, chance in enumerate(chances) if draw.random() >= chance), len(chances))
        total += accepted + 1
    assert total / cycles == pytest.approx(expected_tokens(chances, 3), abs=0.05)


@pytest.mark.parametrize(("acceptance", "drafts"), [(1.5, 1), (-0.1, 1), ([0.5], 2), (0.5, -1)])
def test_what_is_no_acceptance_is_refused(acceptance, drafts):
    with pytest.raises(InputError, match="acceptance"):
        expected_tokens(acceptance, drafts)


def test_no_acceptance_is_a_loss(machine):
    cost = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8}, {}, 10)
    lost = predict_speculation(cost, machine, 0.0, 4, draft_seconds=1e-5)
    assert lost["tokens_per_cycle"] == 1
    assert lost["speedup"] < 1
    gained = predict_speculation(cost, machine, 0.8, 4)
    assert gained["speedup"] > 2
    assert gained["seconds_per_token"] == pytest.approx(gained["decode_seconds"] / gained["speedup"])


def test_a_large_batch_stops_paying(machine):
    """Verification is free only while the step is bound by memory."""
    cost = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8})
    small = predict_speculation(cost, machine, 0.6, 4, batch=1)["speedup"]
    large = predict_speculation(cost, machine, 0.6, 4, batch=1000)["speedup"]
    assert small > 1 > large


def test_the_best_number_of_drafts():
    def speedup(drafts: int) -> float:
        return speculation_speedup(0.7, drafts, decode_seconds=1.0, verify_seconds=1.0 + 0.1 * drafts)

    best = best_drafts(speedup)
    assert 0 < best < 16
    assert speedup(best) == max(speedup(n) for n in range(1, 17))
    assert best_drafts(lambda drafts: 0.9) == 0
