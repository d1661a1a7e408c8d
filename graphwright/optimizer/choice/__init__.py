"""One option for every site and one for the program, together: which are the fastest within the bounds?

Sites (layers) and program-wide options (drafter, tree, length; or none) are priced elsewhere; here are only
their numbers. The choice is an integer program, a multiple-choice knapsack (Sinha and Zoltners 1979,
Operations Research 27(3)) with several knapsacks, solved by HiGHS through ``scipy.optimize.milp``.
"""

from graphwright.optimizer.choice.front import front
from graphwright.optimizer.choice.options import Bounds, ProgramOption, Selection, SiteOption
from graphwright.optimizer.choice.selecting import choose, closest, explain, runners_up

__all__ = [
    "Bounds",
    "ProgramOption",
    "Selection",
    "SiteOption",
    "choose",
    "closest",
    "explain",
    "front",
    "runners_up",
]
