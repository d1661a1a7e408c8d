"""A machine of fixed figures, so that what the planner chooses does not depend on where the tests run."""

from __future__ import annotations

import torch

from graphwright.cost_model import calibrate
from graphwright.cost_model.measure import Curve


def _curve(rate: float, itemsize: int, peak: float) -> Curve:
    """Memory-bound at ``rate`` bytes per second up to the ridge, then at ``peak`` operations per second."""
    intensities = [2 * rows / itemsize for rows in (1, 4, 16, 64, 256)]
    return [[x, max(1 / rate, x / peak)] for x in intensities]


def fixed_figures() -> calibrate.Measured:
    """About a two-core server: 25 GB/s, 300 GFLOP/s, 5 us a launch."""
    curves = {
        "linear.float32": _curve(25e9, 4, 3e11),
        "linear.bfloat16": _curve(25e9, 2, 8e11),
        "attention.float32": _curve(15e9, 4, 1e11),
        "attention.bfloat16": _curve(12e9, 2, 2e11),
    }
    return calibrate.Measured(
        device=calibrate.cpu_name(),
        threads=torch.get_num_threads(),
        bandwidth=3e10,
        flops={"float32": 3e11, "bfloat16": 8e11},
        launch_overhead=5e-6,
        buffer_bytes=2**29,
        bandwidths=[[2.0**25, 6e10], [2.0**29, 3e10]],
        curves=curves,
        launches={name: 3e-6 if name.startswith("linear") else 2e-5 for name in curves},
        activation_rates={"float32": 1.4e10, "bfloat16": 6e9},
        kernel_rates=[[2.0**25, 5e10], [2.0**29, 2.5e10]],
    )


def install() -> None:
    """Make them this machine's figures in the tests' cache folder."""
    calibrate.store(fixed_figures())
