"""Whether the chosen program loses what the sum of its parts said, and no more than the budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphwright.cost_model.workload import Budget
from graphwright.optimizer.quality.metrics import Quality
from graphwright.optimizer.quality.store import Sensitivity


@dataclass(frozen=True)
class Verdict:
    """One measurement of a chosen program against its prediction.

    Attributes:
        ok: the measured loss is within the budget.
        ratio: measured KL over predicted KL; 1 means that the losses of the sites added up. Infinite if
            something was lost that was predicted to be free; 1 if neither was.
        tighten: factor for the budget's bounds (in nats) before choosing again; 1 if the budget is kept.
            Bounds so tightened exclude this program. At 0 the prediction is of no use (something was
            lost that was predicted to be free), and only the exact program is left to choose.
        reason: one sentence for the report.
    """

    ok: bool
    ratio: float
    tighten: float
    reason: str

    def bounds(self, budget: Budget) -> dict[str, float | None]:
        """``kl`` in nats per token and ``perplexity`` as a ratio, tightened; None where there is no bound."""
        kl, perplexity = budget.kl, budget.perplexity
        return {
            "kl": None if kl is None else kl * self.tighten,
            "perplexity": None if perplexity is None else math.exp(math.log(perplexity) * self.tighten),
        }


def check_combined(predicted: Sensitivity, measured: Quality, budget: Budget) -> Verdict:
    """Compare the measurement of a whole program with the sum over its sites and with the budget.

    If the budget is exceeded, the next choice should be made under the budget times
    predicted / measured (the smaller of KL's and perplexity's): a program whose losses add up in the
    same way then just fits. The bound of a quantity that is not in the budget is not checked; with
    neither, whether a program is exact is for the comparison with the stock model to say.

    Args:
        predicted: the sum over the chosen options (:func:`combine`).
        measured: of the program as it runs, on the same text.
        budget: the caller's, not a tightened one.
    """
    ratio = _ratio(measured.kl, predicted.kl)
    exceeded: list[str] = []
    tighten = 1.0
    if budget.kl is not None and not measured.kl <= budget.kl:
        exceeded.append(f"the KL budget is {budget.kl:.3g}")
        tighten = min(tighten, _factor(predicted.kl, measured.kl))
    allowed = None if budget.perplexity is None else math.log(budget.perplexity)
    if allowed is not None and not measured.log_perplexity <= allowed:
        exceeded.append(f"the perplexity budget is {budget.perplexity:.4g}")
        tighten = min(tighten, _factor(predicted.log_perplexity, measured.log_perplexity))
    reason = (
        f"measured KL {measured.kl:.3g} nats a token, predicted {predicted.kl:.3g}; "
        f"perplexity ratio {measured.perplexity_ratio:.4g}, predicted {_exp(predicted.log_perplexity):.4g}"
    )
    if exceeded:
        reason += f"; {' and '.join(exceeded)}"
    return Verdict(not exceeded, ratio, tighten, reason)


def _ratio(measured: float, predicted: float) -> float:
    if predicted > 0:
        return measured / predicted
    return math.inf if measured > 0 else 1.0


def _factor(predicted: float, measured: float) -> float:
    """predicted / measured where that is a factor, and 0 (nothing may be lost) where it is none."""
    factor = predicted / measured if measured > 0 else 0.0
    return min(max(factor, 0.0), 1.0) if math.isfinite(factor) else 0.0


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
