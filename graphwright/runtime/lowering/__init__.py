"""From a rewritten graph to something that runs: kernels chosen, layers split off and compiled once."""

from graphwright.runtime.lowering.lower import LoweredStep, LoweringOptions, Made, lower

__all__ = ["LoweredStep", "LoweringOptions", "Made", "lower"]
