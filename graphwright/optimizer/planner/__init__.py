"""The planner: which passes, for this workload, on this target, within this budget.

1. :mod:`alternatives` – every chain of site passes and every set of program-wide passes, applied to copies.
2. :mod:`prices` – what each takes in each layer, by the cost model, and what it loses, by measurement.
3. :mod:`graphwright.optimizer.choice` – one option per layer and one for the program, as an integer program.
4. :mod:`menu` – hands one to the other, and says why what was not chosen was not.
5. :mod:`planning` – applies the choice to the graph, prices it again as a whole, and keeps the runners-up.
"""

from graphwright.optimizer.planner.planning import plan_best, plan_given
from graphwright.optimizer.planner.request import Candidate, Plan, Planned, Request, to_decision

__all__ = ["Candidate", "Plan", "Planned", "Request", "plan_best", "plan_given", "to_decision"]
