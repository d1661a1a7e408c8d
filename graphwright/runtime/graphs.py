"""Steps recorded once and replayed: CUDA graphs over the fixed addresses of a state.

A decode step launches hundreds of small kernels; a graph launches them together. It replays what was
launched when it was captured, so everything that it reads must stay at one address: parameters, the stores
and lengths of one :class:`~graphwright.runtime.storage.State`, and the static inputs here. Nothing in it may
read contents on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphwright.kernels.registry import REFERENCE
from graphwright.runtime.decoding.memory import is_out_of_memory
from graphwright.runtime.lowering.kernels import KernelUse
from graphwright.runtime.storage import MAX_STEP_TOKENS

#: Reference bodies that decide by contents what to run: how many tokens a row appends, which experts
#: are used, how many slots are read. The other ones only compute.
READS_CONTENTS = frozenset(
    {"routed_linear", "cache_append", "append_attention", "rotary_append", "packed_attention"}
)


class GraphBackend(Protocol):
    """Records work on a device and replays it."""

    def enabled(self, device: torch.device) -> bool:
        """Whether steps on this device are to be captured."""
        ...

    def capture(self, run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        """Record what ``run`` does on the device.

        ``run`` may be called several times: it has to be repeatable. Its result is not used, only that
        of the function that comes back: it replays the work and gives the result, always the same tensor.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        ...


class CudaGraphs:
    """CUDA graphs (HIP graphs on AMD), all in one memory pool.

    One pool is enough: graphs run one after the other on one stream, and what a graph leaves for the
    caller is not handed to another one as long as the graph lives.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def enabled(self, device: torch.device) -> bool:
        """On GPUs."""
        return device.type == "cuda"

    def capture(self, run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        """Warm up on a side stream, as capture asks for, then record there."""
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only what this one does can break the capture.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode=mode):
                result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it hides: ending a capture that failed raises one of its own."""
    while error is not None:
        yield error
        error = error.__context__


def why_not_captured(has_cache: bool, kernels: Sequence[KernelUse], has_exit: bool = False) -> str | None:
    """Why a step with these kernels cannot be a graph, or None if it can.

    Args:
        has_exit: tokens can exit early.
    """
    if has_exit:
        return "tokens exit early: whether all have is read on the host, in the middle of the step"
    if not has_cache:
        return "the program keeps no cache: it runs whole sequences, of another length in every step"
    reading = sorted({k.op for k in kernels if k.provider == REFERENCE and k.op in READS_CONTENTS})
    if not reading:
        return None
    reasons = {k.op: k.reason for k in kernels if k.op in reading and k.provider == REFERENCE}
    named = ", ".join(f"{op} ({reasons[op]})" for op in reading)
    return f"no kernel runs {named}, and the reference reads contents on the host in every step"


def token_bucket(tokens: int) -> int:
    """Tokens of the graph that runs a step of so many: the next power of two."""
    return 1 << (tokens - 1).bit_length()


@dataclass(slots=True)
class StepInputs:
    """What a step is given; see ``Program.step``.

    Attributes:
        tokens: ``[B, T]`` int64.
        counts: ``[B]`` int64.
        depth, tree: ``[B, T]`` int64, or None.
        last: only the logits of each row's last valid token.
        dense: ``[B]`` int64, tokens that read everything; None: none of them.
        prompts: ``[B]`` int64, how many of a row's tokens are its prompt; one tensor in all steps of a state.
        idle: layers that no token of the step uses, which are left out.
        exits: whether any token may exit early.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    depth: torch.Tensor | None
    tree: torch.Tensor | None
    last: bool
    dense: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    idle: frozenset[int] = frozenset()
    exits: bool = False

    @property
    def key(self) -> tuple[int, bool, bool, bool, bool, frozenset[int]]:
        """Steps of one key are one graph."""
        return (
            token_bucket(self.tokens.shape[1]),
            self.depth is not None,
            self.tree is not None,
            self.last and self.tokens.shape[1] > 1,
            self.dense is not None,
            self.idle,
        )

    def static(self) -> StepInputs:
        """Buffers for all steps of this key: zeros, padded to the bucket."""
        rows, width = self.tokens.shape[0], token_bucket(self.tokens.shape[1])

        def like(given: torch.Tensor | None) -> torch.Tensor | None:
            return None if given is None else given.new_zeros((rows, width))

        tokens, counts = self.tokens.new_zeros((rows, width)), torch.zeros_like(self.counts)
        dense = None if self.dense is None else torch.zeros_like(self.dense)
        given = (tokens, counts, like(self.depth), like(self.tree), self.key[3], dense)
        return StepInputs(*given, prompts=self.prompts, idle=self.idle)

    def copy_from(self, given: StepInputs) -> None:
        """Take a step's inputs over. Columns beyond its tokens are padding, whatever they hold."""
        self.counts.copy_(given.counts)
        if self.dense is not None and given.dense is not None:
            self.dense.copy_(given.dense)
        width = given.tokens.shape[1]
        pairs = ((self.tokens, given.tokens), (self.depth, given.depth), (self.tree, given.tree))
        for mine, other in pairs:
            if mine is not None and other is not None:
                mine[:, :width].copy_(other)


class StepGraphs:
    """The graphs of one state.

    Args:
        backend: records and replays.
        run: the step over the state; repeatable, as nothing is committed in it.
        device: of the state.
        refused: told why, when a step turns out not to be capturable.

    The first step of a key runs as it is, the second one is captured: what happens once costs no capture.
    """

    def __init__(
        self,
        backend: GraphBackend,
        run: Callable[[StepInputs], torch.Tensor],
        device: torch.device,
        refused: Callable[[str], None],
    ) -> None:
        self._backend, self._run, self._device, self._refused = backend, run, device, refused
        self._seen: set[tuple[object, ...]] = set()
        self._captured: dict[tuple[object, ...], tuple[StepInputs, Callable[[], torch.Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def step(self, given: StepInputs) -> torch.Tensor:
        """Logits of a step of at most 64 tokens, in a tensor of their own."""
        key, width = given.key, given.tokens.shape[1]
        assert width <= MAX_STEP_TOKENS
        if key not in self._captured:
            if key not in self._seen:
                self._seen.add(key)
                return self._run(given)
            if not self._capture(given):
                return self._run(given)
        inputs, replay = self._captured[key]
        inputs.copy_from(given)
        logits = replay()
        # The next replay writes there again, and callers may keep logits.
        return logits.clone() if given.last else logits[:, :width].clone()

    def _capture(self, given: StepInputs) -> bool:
        inputs, run = given.static(), self._run
        inputs.copy_from(given)
        try:
            replay = self._backend.capture(lambda: run(inputs), self._device)
        except RuntimeError as error:
            if memory := next((e for e in _chain(error) if is_out_of_memory(e)), None):
                raise memory from error
            self._refused(f"a step could not be captured: {error}")
            return False
        self._captured[given.key] = (inputs, replay)
        return True
