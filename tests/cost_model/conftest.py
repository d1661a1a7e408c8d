"""Graphs by hand, and captured models on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import Node

from graphwright.cost_model import Target
from graphwright.ir.graph import Graph


class Sketch:
    """Builds a graph with symbolic batch and tokens, call by call."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        fx = torch.fx.Graph()
        fx.output(())
        self.graph = Graph(fx, {}, self.mode)
        self.ids = self.graph.add_placeholder("input", "input_ids", self.dynamic((3, 5), torch.int64))

    def dynamic(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor whose every size is symbolic."""
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(shape))
        return self.mode.from_tensor(torch.empty(shape, dtype=dtype), symbolic_context=context)

    def weight(self, name: str, *shape: int) -> Node:
        """A parameter."""
        tensor = torch.empty(shape, dtype=self.dtype, device="meta")
        self.graph.parameters[name] = tensor
        with self.mode:
            fake = torch.empty(shape, dtype=self.dtype)
        return self.graph.add_placeholder("parameter", name, fake)

    def state(self, name: str, groups: int, slots: int, depth: int) -> Node:
        """A store ``[B, groups, slots, depth]``; its number of slots is symbolic."""
        capacity = self.dynamic((slots,), torch.int64).shape[0]
        with self.mode:
            fake = torch.empty(self.ids.meta["val"].shape[0], groups, capacity, depth, dtype=self.dtype)
        return self.graph.add_placeholder("state", name, fake)

    def input(self, name: str, *sizes: Any, dtype: torch.dtype | None = None) -> Node:
        """A value computed elsewhere; ``"B"`` and ``"T"`` stand for batch and tokens."""
        batch, tokens = self.ids.meta["val"].shape
        shape = [{"B": batch, "T": tokens}.get(s, s) if isinstance(s, str) else s for s in sizes]
        with self.mode:
            fake = torch.empty(shape, dtype=dtype or self.dtype)
        return self.graph.add_placeholder("input", name, fake)

    def rows(self) -> Any:
        """Batch times tokens."""
        batch, tokens = self.ids.meta["val"].shape
        return batch * tokens

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call."""
        return self.graph.emit(target, *args, **kwargs)

    def done(self, *results: Node) -> Graph:
        """The graph, with these results."""
        self.graph.output.args = (tuple(results),)
        return self.graph


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


@pytest.fixture(scope="session")
def captured() -> Callable[..., Graph]:
    """``captured(LlamaConfig(...))`` as a graph of a bfloat16 model without weights, kept for the session."""
    from transformers import AutoModelForCausalLM

    from graphwright.optimizer.capture import capture

    kept: dict[int, Graph] = {}

    def get(config: Any) -> Graph:
        key = id(config)  # a model changes its configuration, so its text is no key
        if key not in kept:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            kept[key] = capture(model.eval())
        return kept[key]

    return get


@pytest.fixture
def machine() -> Target:
    """A machine of round numbers: 100 GB/s, 10 TFLOP/s, 1 us a launch, no on-chip cache to speak of."""
    return Target(
        name="round", title="round numbers", vendor="cpu", kind="cpu", arch="", memory_bytes=10**10,
        bandwidth=1e11, peak_flops={"float32": 1e12, "bfloat16": 1e13}, launch_overhead=1e-6,
        on_chip_cache=2**30,
    )  # fmt: skip
