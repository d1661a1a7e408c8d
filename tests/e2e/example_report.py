"""A report with something in every section, for the tests of its views."""

from __future__ import annotations

from typing import Any

from graphwright.optimizer.report import Decision, Report, Status

HOSTILE = '_<script>alert("x")</script> [red]not markup[/red] $\\frac{1}{x}$ \x1b[31m & #010101 \u202e'


def make_report(**changes: object) -> Report:
    """A report with something in every section; 30 layers decide alike."""
    layers = [
        Decision(
            "place_cache",
            f"layers.{layer}",
            Status.APPLIED,
            "keys and values are the minimum cut",
            {"seconds_per_token": -1e-4},
            {"seconds_per_token": -2e-4},
        )
        for layer in range(30)
    ]
    others = [
        Decision("absorb_projections", "", Status.NOT_FOUND, "no layer stores a latent"),
        Decision("place_cache{cut=layer_input}", "layers.0", Status.UNPROFITABLE, "recomputing costs more"),
        Decision("speculate{drafter=ngram}", "", Status.UNDONE, "slower", {"speedup": 1.3}, {"speedup": 0.9}),
        Decision("linear", "lm_head", Status.FALLBACK, "no compiler", None, None, "reordered"),
        Decision("fuse", "layers.1", Status.ILLEGAL, "the weights have different dtypes"),
    ]
    values: dict[str, object] = {
        "model": "LlamaForCausalLM, 134.5 M parameters, bfloat16",
        "target": "cpu",
        "workload": {"batch": 1, "prompt": 256, "generate": 64, "shared_prefix": 0},
        "decisions": [*layers, *others],
        "predicted": {
            "decode": {
                "seconds_per_token": 0.0071,
                "tokens_per_second": 140.8,
                "bound": "memory",
                "memory_seconds": 0.0062,
                "compute_seconds": 0.0011,
                "seconds_by_op": {"linear": 0.005, "attention": 0.0015, "rms_norm": 0.0006},
            },
            "before": {
                "seconds_per_token": 0.0112,
                "seconds_by_op": {"linear": 0.006, "attention": 0.004, "rms_norm": 0.0012},
            },
            "memory": {"weights_bytes": 269_000_000, "cache_bytes": 7_372_800},
        },
        "measured": {
            "decode": {"seconds_per_token": 0.0078, "tokens_per_second": 128.2},
            "stock": {"seconds_per_token": 0.0251},
            "quality": {"max_abs_logit_difference": 0.0, "mean_kl": 0.0, "top1_agreement": 1.0},
            "seconds": {"capture": 5.4, "lower": 13.0},
        },
        "ops": {"rms_norm": 61, "attention": 30},
        "near_misses": ["layers.7.mlp: gate and up differ in dtype"],
        "kernels": [{"op": "linear", "provider": "cpp", "reason": "bfloat16"}] * 3,
        "compiled": {
            "target": "h100",
            "arch": "sm_90",
            "triton": "3.9.0",
            "note": "on h100 these run their reference body: attention x 1 (it has no kernel for attention)",
            "kernels": [
                {
                    "label": "attend d64 g3",
                    "ops": "cache_attention x 30 (decode)",
                    "registers": 168,
                    "spill_bytes": 0,
                    "shared_bytes": 16640,
                    "num_warps": 4,
                    "binary_bytes": 65536,
                    "error": "",
                },
                {
                    "label": "linear x1",
                    "ops": "linear x 60 (decode)",
                    "registers": 0,
                    "spill_bytes": 0,
                    "shared_bytes": 0,
                    "num_warps": 0,
                    "binary_bytes": 0,
                    "error": "ptxas died",
                },
            ],
        },
        "speculation": {"drafter": "ngram", "tokens_per_cycle": 1.6},
        "costs": {"decode": make_cost()},
        "plans": make_plans(),
        "curves": make_curves(),
        "crossovers": [
            {
                "what": "speculation stops paying",
                "quantity": "batch",
                "value": 12.0,
                "note": "From a batch of 12 on, it is compute-bound.",
            },
            {"what": "the cache outweighs the weights", "quantity": "context", "value": None, "note": ""},
            {"what": "it is full", "quantity": "context", "value": 9000.0, "note": "Nothing fits"},
        ],
        "code_before": "def forward(x):\n    return x\n",
        "code_after": "def forward(x):\n    return x + 0\n",
        "versions": {"graphwright": "0.1.0", "threads": 2},
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def make_cost() -> dict[str, Any]:
    """A decode step."""
    return {
        "expression": {
            "flops": {"bfloat16": "2*B*T*134515008"},
            "read": {"weights": "269030016", "cache": "46080*B*(C + T)"},
            "written": {"cache": "46080*B*T"},
            "launches": "187",
        },
        "at": {"batch": 1, "context": 288.0, "tokens": 1},
        "value": {
            "flops": {"bfloat16": 269_030_016.0},
            "bytes_read": 282_347_136.0,
            "bytes_written": 46_080.0,
            "launches": 187.0,
            "seconds": 0.0071,
        },
    }


def make_plan(status: str, seconds: float, size: float, kl: float, *passes: str) -> dict[str, Any]:
    """One plan that was not measured."""
    predicted = {"seconds_per_token": seconds, "memory_bytes": size, "kl": kl, "perplexity_ratio": 1 + kl}
    return {
        "passes": list(passes),
        "status": status,
        "reason": f"{status} for a reason",
        "predicted": predicted,
        "measured": None,
    }


def make_plans() -> list[dict[str, Any]]:
    """A front of three plans and one that was undone; the chosen one, which was measured, comes second."""
    plans = [
        make_plan("runner-up", 0.0090, 2.8e8, 0.0, "place_cache"),
        make_plan("chosen", 0.0071, 2.7e8, 0.004, "place_cache", "quantize_cache{bits=4}"),
        make_plan("runner-up", 0.0075, 2.75e8, 0.001, "place_cache", "quantize_cache{bits=8}"),
        make_plan("undone", 0.0060, 2.6e8, 0.005, "place_cache", "quantize_cache{bits=2}"),
    ]
    plans[1]["measured"] = {"seconds_per_token": 0.0078, "kl": 0.005}
    return plans


def make_curves() -> dict[str, Any]:
    """A roofline with two ops on it and one that computes nothing, and memory at three contexts."""
    rates = (("linear", 1.0, 3.7e10, 0.005), ("attention", 6.0, 1.1e11, 0.0015), ("copy", 0.0, 0.0, 1e-4))
    return {
        "roofline": {
            "flops_per_second": 1.9e12,
            "bytes_per_second": 4.1e10,
            "ops": [
                {"op": op, "intensity": x, "flops_per_second": y, "bytes_per_second": 3e10, "seconds": t}
                for op, x, y, t in rates
            ],
        },
        "memory": {
            "points": [
                {"context": c, "weights_bytes": 2.7e8, "cache_bytes": c * 46_080, "workspace_bytes": 2e7}
                for c in (128, 1024, 8192)
            ],
            "limit_bytes": 8e8,
        },
    }
