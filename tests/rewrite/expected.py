"""How many semantic ops each architecture holds, as a function of its number of layers."""

from __future__ import annotations

from collections.abc import Callable

Counts = dict[str, int]


def _llama(layers: int, norms: int = 2, linears: int = 4) -> Counts:
    """A layer: attention, two norms, rotary for q and k, projections q, k, v, o and a gated MLP.

    Around the layers: one norm before the head, and the head.
    """
    return {
        "attention": layers,
        "rms_norm": norms * layers + 1,
        "rotary": 2 * layers,
        "linear": linears * layers + 1,
        "gated_mlp": layers,
    }


def _mixture(layers: int, norms: int = 2) -> Counts:
    """As Llama, but a router (one more linear) and two routed projections instead of the MLP."""
    counts = _llama(layers, norms=norms, linears=5) | {"routed_linear": 2 * layers}
    del counts["gated_mlp"]
    return counts


def _plain(layers: int, linears: int, rotary: bool) -> Counts:
    """Layer norms and a plain MLP: two norms a layer and one at the end, the head."""
    counts = {
        "attention": layers,
        "layer_norm": 2 * layers + 1,
        "linear": linears * layers + 1,
        "mlp": layers,
    }
    return counts | ({"rotary": 2 * layers} if rotary else {})


def _smollm3(layers: int) -> Counts:
    """As Llama, without rotary in every fourth layer (NoPE)."""
    return _llama(layers) | {"rotary": 2 * (layers - layers // 4)}


def _deepseek_v3(layers: int, dense: int = 1) -> Counts:
    """Attention has five projections (q_a, q_b, kv_a, kv_b, o) and two norms of its own (q_a, kv_a).

    The first ``dense`` layers have a gated MLP; the others a shared expert, which is one too, and
    a router and two routed projections.
    """
    routed = layers - dense
    return {
        "attention": layers,
        "rms_norm": 4 * layers + 1,
        "rotary": 2 * layers,
        "linear": 5 * layers + routed + 1,
        "gated_mlp": layers,
        "routed_linear": 2 * routed,
    }


EXPECTED: dict[str, Callable[[int], Counts]] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": lambda layers: _llama(layers, norms=4),  # norms of q and k
    "qwen3_moe": lambda layers: _mixture(layers, norms=4),
    "gemma2": lambda layers: _llama(layers, norms=4),  # norms after attention and MLP too
    "gemma3_text": lambda layers: _llama(layers, norms=6),  # those, and of q and k
    "mistral": _llama,
    "mixtral": _mixture,
    "phi3": lambda layers: _llama(layers, linears=2),  # q, k, v packed
    "gpt2": lambda layers: _plain(layers, linears=2, rotary=False),  # q, k, v packed; learned positions
    "gpt_neox": lambda layers: _plain(layers, linears=2, rotary=True),  # q, k, v packed
    "gpt_oss": _mixture,
    "opt": lambda layers: _plain(layers, linears=4, rotary=False),  # learned positions
    "olmo2": lambda layers: _llama(layers, norms=4),  # norms of q and k, and after attention and MLP
    "granite": _llama,
    "smollm3": _smollm3,
    "starcoder2": lambda layers: _plain(layers, linears=4, rotary=True),
    "deepseek_v3": _deepseek_v3,
    "glm4": lambda layers: _llama(layers, norms=4),  # norms after attention and MLP too
}
