"""CUDA graphs without a GPU: closures that are run again, and watched for what a graph cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.storage import State
from tests.e2e.packed_programs import PAGE, random_text

PLAIN = ("place_cache{cut=kv}",)
PACKED = (*PLAIN, f"quantize_cache{{codec=int,bits=8,page={PAGE},first=3,recent=5}}")
KINDS = ["dense", "windowed", "packed", "windowed packed"]

Make = Callable[[str], tuple[Program, Any]]

_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")


class Watch(TorchDispatchMode):
    """Refuses reads of contents and notes the storages that come from outside.

    Attributes:
        outside: the first byte of every storage that was not made while watching, in order of use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[int, None] = {}
        self._made: dict[int, torch.Tensor] = {}  # kept, so that no address is used twice
        self._inside_an_op = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masked = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype is torch.bool for t in tree_leaves(args[1])
        )
        assert name not in _READS and not masked, f"{name} reads contents on the host"
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                address = tensor.untyped_storage().data_ptr()
                if address not in self._made:
                    self.outside[address] = None
        self._inside_an_op = True
        try:
            results = func(*args, **(kwargs or {}))
        finally:
            self._inside_an_op = False
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                address = tensor.untyped_storage().data_ptr()
                if address not in self.outside:
                    self._made[address] = tensor
        return results

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block; what a kernel does inside is its own business."""
        tolist = torch.Tensor.tolist

        def refused(tensor: torch.Tensor) -> Any:
            assert self._inside_an_op, "tolist() reads contents on the host"
            return tolist(tensor)

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(torch.Tensor, "tolist", refused)
            yield


class Recording:
    """A captured closure: runs again on every replay and insists on the addresses of the first time."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run, self.replays = run, 0
        run()  # warm-up, and it must be repeatable
        self._addresses, result = self._watched()
        self._result = result.clone()

    def _watched(self) -> tuple[list[int], torch.Tensor]:
        watch = Watch()
        with watch.watching():
            result = self._run()
        return list(watch.outside), result

    def __call__(self) -> torch.Tensor:
        self.replays += 1
        addresses, result = self._watched()
        assert addresses == self._addresses, "a replay was given tensors that the capture had not seen"
        return self._result.copy_(result)


class RecordedGraphs:
    """A ``GraphBackend`` for every device.

    Attributes:
        captured: in order.
    """

    def __init__(self) -> None:
        self.captured: list[Recording] = []

    def enabled(self, device: torch.device) -> bool:
        return True

    def capture(self, run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        self.captured.append(Recording(run))
        return self.captured[-1]

    @property
    def replays(self) -> int:
        return sum(one.replays for one in self.captured)


def with_graphs(program: Program, backend: Any = None) -> tuple[Program, Any]:
    """A second program of the same step, with graphs; and what records them."""
    backend = RecordedGraphs() if backend is None else backend
    made = Program(
        program.lowered,
        config=program.config,
        device=program.device,
        dtype=program.dtype,
        vocab_size=program.vocab_size,
        max_positions=program.max_positions,
        graphs=backend,
    )
    return made, backend


def as_model(program: Any, model: Any, speculation: Any = None) -> OptimizedModel:
    """``generate`` on a program of a stock model."""
    own = {"config": model.config, "generation_config": model.generation_config}
    return OptimizedModel(program, speculation=speculation, **own)


def prefilled(program: Program, lengths: tuple[int, ...] = (30, 17)) -> State:
    """A state of two rows."""
    state = program.allocate(len(lengths), 200)
    program.prefill(state, random_text(len(lengths), max(lengths)), torch.tensor(lengths))
    return state


def step(program: Program, state: State, width: int, **options: Any) -> torch.Tensor:
    """A step of ``width`` tokens in the first row and half as many in the second."""
    return program.step(
        state, random_text(2, width, seed=width), torch.tensor([width, width // 2]), **options
    )
