"""Programs on the chip: graphs, the loop that runs ahead, memory that runs out, drafts, packed caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import graphwright as gw
from graphwright.ir.errors import OutOfMemoryError
from graphwright.runtime.decoding.device_loop import DeviceLoop
from graphwright.runtime.graphs import CudaGraphs
from graphwright.runtime.program import Program
from tests.architectures import tiny_model
from tests.e2e.graph_stand_in import as_model, with_graphs
from tests.e2e.packed_programs import PAGE, PackedModel, drafting, random_text, repetitive_prompts
from tests.gpu.support import DEVICE, REHEARSED, SINGLE, USUAL

pytestmark = pytest.mark.gpu

PLACE = "place_cache{cut=kv}"
PASSES = {
    "dense": [PLACE],
    "int8": [PLACE, f"quantize_cache{{codec=int,bits=8,page={PAGE},first=3,recent=5}}"],
    "combined4": [PLACE, f"quantize_cache{{codec=combined,bits=4,page={PAGE}}}"],
}
_SIZE = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 2048}
#: In a rehearsal programs run on the CPU's own kernels.
DTYPE = SINGLE if REHEARSED else USUAL
OPTIONS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


class NoGraphs(CudaGraphs):
    """Every step runs as it is."""

    def enabled(self, device: torch.device) -> bool:
        return False


@pytest.fixture(scope="module")
def lab() -> PackedModel:
    """A small model on the device: grouped heads, two layers."""
    model = tiny_model("llama", DTYPE, num_attention_heads=4, num_key_value_heads=2, **_SIZE)
    return PackedModel(model.to(DEVICE))


@pytest.fixture(scope="module")
def programs(lab: PackedModel) -> dict[tuple[str, bool], Program]:
    """By passes, and whether Inductor compiles what is between the kernels."""
    made: dict[tuple[str, bool], Program] = {}
    for name, passes in PASSES.items():
        for compiled in (False, True) if not REHEARSED else (False,):
            program = lab.program(passes, compiled).program
            assert isinstance(program, Program)
            made[name, compiled] = program
    return made


def prompts(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids, mask = repetitive_prompts(lengths)
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


KINDS = [(name, compiled) for name in PASSES for compiled in ((False,) if REHEARSED else (False, True))]


@pytest.mark.skipif(REHEARSED, reason="programs run on the CPU's own kernels")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_run_it(programs: Any, kind: tuple[str, bool]) -> None:
    """No op of a decode step runs as reference code, and steps are graphs."""
    program = programs[kind]
    others = [k for k in program.lowered.kernels if k.provider != "triton"]
    assert not others, others
    assert program.graphs_off is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_stock_model(lab: PackedModel, programs: Any, kind: tuple[str, bool]) -> None:
    """In steps of 16 tokens; a packed cache loses what its codec loses."""
    program = programs[kind]
    ids = random_text(2, 96).to(DEVICE)
    with torch.no_grad():
        expected = lab.model(ids, use_cache=False).logits.float()
    state, found = program.allocate(2, 96), []
    counts = torch.full((2,), 16, device=DEVICE)
    for start in range(0, 96, 16):
        found.append(program.step(state, ids[:, start : start + 16], counts).float())
        state.commit(counts)
    error = (torch.cat(found, 1) - expected).norm() / expected.norm()
    assert error < {"dense": 3e-2, "int8": 6e-2, "combined4": 0.3}[kind[0]], error


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_graphs_give_the_eager_tokens(
    lab: PackedModel, programs: Any, kind: tuple[str, bool], speculative: bool
) -> None:
    program = programs[kind]
    eager, _ = with_graphs(program, NoGraphs())
    speculation = drafting() if speculative else None
    given = prompts([70, 33, 9])
    for _ in range(2):  # the second time, everything is replayed
        found = as_model(program, lab.model, speculation).generate(**given, max_new_tokens=60, **OPTIONS)
        wanted = as_model(eager, lab.model, speculation).generate(**given, max_new_tokens=60, **OPTIONS)
        assert torch.equal(found, wanted)
    assert program.graphs_off is None


@pytest.mark.parametrize("lengths", [[70], [33], [150, 9, 64, 80]], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_tokens_with_and_without_drafts(
    lab: PackedModel, programs: Any, kind: tuple[str, bool], lengths: list[int]
) -> None:
    """In bfloat16, and drafts are taken and refused."""
    given = prompts(lengths)
    plain = as_model(programs[kind], lab.model)
    drafts = as_model(programs[kind], lab.model, drafting())
    wanted = plain.generate(**given, max_new_tokens=100, **OPTIONS)
    assert torch.equal(drafts.generate(**given, max_new_tokens=100, **OPTIONS), wanted)
    assert drafts.stats()["last"]["row_steps"] < plain.stats()["last"]["row_steps"] or kind[0] != "dense"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_alone_and_in_a_batch(lab: PackedModel, programs: Any, kind: tuple[str, bool]) -> None:
    """Logits of a step: close, and of one argmax; chunks of the cache depend on the batch."""
    program, lengths = programs[kind], [90, 33, 70]
    given = prompts(lengths)
    rows = [given["input_ids"][row, -length:] for row, length in enumerate(lengths)]
    found = []
    for own in ([0, 1, 2], [0], [1], [2]):
        state = program.allocate(len(own), 200)
        padded = torch.zeros((len(own), max(lengths[r] for r in own)), dtype=torch.int64, device=DEVICE)
        for at, row in enumerate(own):
            padded[at, : lengths[row]] = rows[row]
        counts = torch.tensor([lengths[r] for r in own], device=DEVICE)
        program.prefill(state, padded, counts)
        ones = torch.ones(len(own), dtype=torch.int64, device=DEVICE)
        found.append(program.step(state, torch.full((len(own), 1), 5, device=DEVICE), ones)[:, 0].float())
    for row in range(3):
        error = (found[row + 1][0] - found[0][row]).norm() / found[0][row].norm()
        assert error < 3e-2, (row, error)


@pytest.mark.skipif(REHEARSED, reason="needs streams")
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_no_step_waits_for_the_device(
    lab: PackedModel, programs: Any, monkeypatch: pytest.MonkeyPatch, sample: bool
) -> None:
    """Between the prompt and the last token nothing synchronizes but the arrival of old tokens."""
    decode = DeviceLoop._decode

    def watched(self: DeviceLoop, state: Any, logits: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode(self, state, logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = as_model(programs["int8", True], lab.model)
    given = prompts([70, 33])
    options = OPTIONS | {"do_sample": sample, "max_new_tokens": 50}
    model.generate(**given, **options)  # captures
    monkeypatch.setattr(DeviceLoop, "_decode", watched)
    assert model.generate(**given, **options).shape == (2, 120)


@pytest.mark.skipif(REHEARSED, reason="needs streams")
def test_the_loop_that_runs_ahead_gives_the_same(
    lab: PackedModel, programs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs["dense", True]
    given = prompts([70, 33, 9])
    model = as_model(program, lab.model)
    for options in ({}, {"do_sample": True, "top_k": 9}, {"eos_token_id": 5}):
        results = []
        for ahead in (True, False):
            monkeypatch.setattr(program, "runs_ahead", ahead)
            torch.manual_seed(3)
            results.append(model.generate(**given, max_new_tokens=60, **(OPTIONS | options)))
        assert torch.equal(*results), options


@pytest.mark.skipif(REHEARSED, reason="needs the device's memory")
@pytest.mark.parametrize("kind", [("dense", True), ("int8", True)], ids=str)
def test_memory_that_runs_out_in_a_generation(
    lab: PackedModel, programs: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first token, or at the start: a clear error, nothing kept, the same tokens afterwards."""
    program = programs[kind]
    model = as_model(program, lab.model)
    given, many = prompts([70, 33]), random_text(512, 1500).to(DEVICE)
    wanted = model.generate(**given, max_new_tokens=60, **OPTIONS)

    def nothing_more() -> None:
        """This process gets no further memory from the device; what it holds it may use."""
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(DEVICE) / total, DEVICE)

    class Narrow:
        """A streamer after whose first token memory is at its end: the step to be captured needs some."""

        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 2:
                nothing_more()

        def end(self) -> None:
            """Nothing to end."""

    try:
        with monkeypatch.context() as patch:
            patch.setattr(program, "runs_ahead", False)  # the streamer sees a token before the next step
            program.free_idle()
            with pytest.raises(OutOfMemoryError, match="memory ran out"):
                model.generate(**prompts([70]), max_new_tokens=60, streamer=Narrow(), **OPTIONS)
        assert program.cache_bytes() == 0
        nothing_more()
        with pytest.raises(OutOfMemoryError, match="memory ran out"):
            model.generate(many, max_new_tokens=60, **OPTIONS)
        assert program.cache_bytes() == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert program.graphs_off is None
    assert torch.equal(model.generate(**given, max_new_tokens=60, **OPTIONS), wanted)


@pytest.mark.slow
@pytest.mark.skipif(REHEARSED, reason="plans for the machine at hand")
def test_optimize_for_the_gpu_at_hand() -> None:
    """The planner's own choice: checked against the stock model, tuned, measured, reported."""
    sizes = {**_SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", DTYPE, layers=4, **sizes).to(DEVICE)
    fast = gw.optimize(model, workload=gw.Workload(prompt=256, generate=64))
    ids = random_text(1, 256).to(DEVICE)
    assert fast.generate(ids, max_new_tokens=32, **OPTIONS).shape == (1, 288)
    report = fast.report
    assert report.measured["decode"]["seconds_per_token"] > 0
    assert any(k.provider == "triton" for k in fast.program.lowered.kernels)
    assert report.measured["quality"]["relative_logit_difference"] < 0.25
