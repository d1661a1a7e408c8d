"""``generate(assistant_model=...)`` as transformers has it, and draft models that passes name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

import graphwright
from graphwright.ir.errors import (
    GraphwrightError,
    InputError,
    ProgramBusyError,
    UnsupportedGenerationError,
)
from graphwright.ir.graph import Graph
from graphwright.optimizer import draft_models
from graphwright.passes.base import parse_pass
from graphwright.passes.speculate import Speculate
from graphwright.runtime.decoding.assistants import assisted
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import AdaptiveLength, FixedLength
from graphwright.runtime.speculation.draft_model import DraftModel
from graphwright.runtime.speculation.drafters.model import ModelDrafter
from tests.e2e.fake_program import VOCAB, ReferenceProgram
from tests.e2e.test_generate import RAGGED, Recorder, padded
from tests.e2e.test_model_drafter import fast_of, noisy
from tests.e2e.test_vocabularies import DRAFT, TARGET

IDS = torch.tensor([RAGGED[0]])


def assistant_of(model: Any) -> OptimizedModel:
    return fast_of(model, None)


@pytest.fixture
def small(llama: Any) -> Any:
    """A model that is right now and then, and as confident as transformers wants its assistants."""
    return noisy(llama, 0.3)


@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one", "ragged"])
def test_an_assistant_changes_nothing_but_the_steps(llama: Any, small: Any, rows: list[list[int]]) -> None:
    fast, inputs = fast_of(llama, None), padded(rows, "left")
    want = llama.generate(**inputs, max_new_tokens=20)
    got = fast.generate(**inputs, max_new_tokens=20, assistant_model=assistant_of(small))
    assert torch.equal(got, want)
    last = fast.stats()["last"]
    assert last["by_drafter"]["model"]["accepted"] > 0 and last["cycles"] < 19
    assert torch.equal(fast.generate(**inputs, max_new_tokens=20), want)
    assert fast.stats()["last"]["by_drafter"] == {}  # it was for that call only


def test_it_agrees_with_transformers_own_assistance(llama: Any, small: Any) -> None:
    options = {"max_new_tokens": 16, "do_sample": False}
    stock = llama.generate(IDS, assistant_model=small, **options)
    fast = fast_of(llama, None)
    assert torch.equal(fast.generate(IDS, assistant_model=assistant_of(small), **options), stock)


def test_options_become_length_rules(llama: Any) -> None:
    model = DraftModel(ReferenceProgram(llama))
    usual = assisted(model, {})
    assert usual.rule == FixedLength(20) and usual.drafter.confidence == 0.4
    config = llama.generation_config
    given = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"}
    assert assisted(model, given, None, config).rule == AdaptiveLength(start=5, low=1, high=62)
    assert assisted(model, {"num_assistant_tokens": 100}).rule == FixedLength(62)
    assert assisted(model, {"assistant_confidence_threshold": 0.0}).drafter.confidence == 0.0
    for wrong in ({"num_assistant_tokens": 0}, {"num_assistant_tokens_schedule": "sometimes"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            assisted(model, wrong)
    with pytest.raises(UnsupportedGenerationError, match="target_lookbehind"):
        assisted(model, {"target_lookbehind": 3})


def test_the_assistants_own_configuration_counts(llama: Any) -> None:
    fast, assistant = fast_of(llama, None), assistant_of(llama)
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.assistant_confidence_threshold = 0.0
    fast.generate(IDS, max_new_tokens=13, assistant_model=assistant)
    assert fast.stats()["last"]["cycles"] == 4
    fast.generate(IDS, max_new_tokens=13, assistant_model=assistant, num_assistant_tokens=5)
    assert fast.stats()["last"]["cycles"] == 2


def test_bad_assistants(llama: Any) -> None:
    fast = fast_of(llama, None)
    with pytest.raises(UnsupportedGenerationError, match="assistant_model") as refused:
        fast.generate(IDS, max_new_tokens=3, assistant_model=llama)
    assert "optimize" in str(refused.value.hint)
    with pytest.raises(InputError, match="without assistant_model"):
        fast.generate(IDS, max_new_tokens=3, assistant_tokenizer=DRAFT)
    with pytest.raises(UnsupportedGenerationError, match="assistant_ensemble_weight"):
        fast.generate(IDS, max_new_tokens=3, assistant_ensemble_weight=0.5)
    elsewhere = assistant_of(llama)
    elsewhere.program.device = torch.device("meta")
    with pytest.raises(InputError, match="on meta, the program on cpu"):
        fast.generate(IDS, max_new_tokens=3, assistant_model=elsewhere)
    stranger = assistant_of(llama)
    stranger.program.vocab_size = VOCAB + 4
    with pytest.raises(InputError, match="assistant_tokenizer") as caught:
        fast.generate(IDS, max_new_tokens=3, assistant_model=stranger)
    assert f"knows {VOCAB} tokens and the draft model {VOCAB + 4}" in str(caught.value)
    assert fast.program.steps == 0


def test_both_programs_are_held_while_one_assists(llama: Any) -> None:
    fast, assistant = fast_of(llama, None), assistant_of(llama)

    class Inside(Recorder):
        def put(self, value: torch.Tensor) -> None:
            assistant.generate(IDS, max_new_tokens=2)

    with pytest.raises(ProgramBusyError):
        fast.generate(IDS, max_new_tokens=4, assistant_model=assistant, streamer=Inside())
    assert assistant.generate(IDS, max_new_tokens=2).shape[1] == IDS.shape[1] + 2
    itself = fast.generate(IDS, max_new_tokens=6, assistant_model=fast)  # one program, held once
    assert torch.equal(itself, llama.generate(IDS, max_new_tokens=6))


def test_another_vocabulary_with_tokenizers(llama: Any) -> None:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    target, small = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    fast, ids = fast_of(target, None), torch.tensor([[1, 2, 3, 5]])
    want = target.generate(ids, max_new_tokens=12)
    options = {"tokenizer": TARGET, "assistant_tokenizer": DRAFT, "assistant_confidence_threshold": 0.0}
    got = fast.generate(ids, max_new_tokens=12, assistant_model=assistant_of(small), **options)
    assert torch.equal(got, want) and fast.stats()["last"]["draft_tokens"] > 0


# --- compiled by the optimizer -------------------------------------------------------------------


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """``optimize`` by recomputation; the models that were given to it."""
    seen: list[Any] = []

    def optimize(model: Any) -> OptimizedModel:
        seen.append(type(model).__name__)
        return assistant_of(model)

    monkeypatch.setattr("graphwright.optimizer.driver.optimize", optimize)
    return seen


def test_a_transformers_assistant_is_compiled_once(llama: Any, compiled_once: list[Any]) -> None:
    small = noisy(llama, 0.3)
    program = draft_models.draft_program(small)
    assert draft_models.draft_program(small) is program and compiled_once == ["LlamaForCausalLM"]
    other = noisy(llama, 0.1)
    assert draft_models.draft_program(other) is not program and len(compiled_once) == 2


def test_passes_name_a_folder(
    llama: Any, compiled_once: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy(llama, 0.3).save_pretrained(tmp_path)
    chosen = parse_pass(f"speculate{{drafter=model(path={tmp_path}, confidence=0.1),tokens=4}}")
    assert isinstance(chosen, Speculate) and parse_pass(str(chosen)) == chosen
    draft_models.check_draft_models([chosen])

    planned = Graph(torch.fx.Graph(), {}, FakeTensorMode())
    planned.annotations["speculation"] = chosen.options()
    program = ReferenceProgram(llama)
    fast = fast_of(llama, draft_models.ready_speculation(planned, program, llama))
    assert torch.equal(fast.generate(IDS, max_new_tokens=16), llama.generate(IDS, max_new_tokens=16))
    assert fast.stats()["last"]["by_drafter"]["model"]["accepted"] > 0 and len(compiled_once) == 1


def test_a_folder_that_is_not_there_is_refused_first(llama: Any, tmp_path: Path) -> None:
    for drafter, what in (
        (f"model(path={tmp_path}/none)", "cannot be loaded"),
        ("retokenized", "which model"),
    ):
        with pytest.raises(InputError, match=what):
            graphwright.optimize(llama, passes=["place_cache", f"speculate{{drafter={drafter}}}"])


def test_what_cannot_be_compiled_cannot_assist() -> None:
    small = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB
    )
    with pytest.raises(GraphwrightError):
        draft_models.draft_program(BertLMHeadModel(small))
    with torch.device("meta"):
        ghost = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1,
                                             intermediate_size=16, num_attention_heads=2))  # fmt: skip
    with pytest.raises(GraphwrightError, match="meta"):
        draft_models.draft_program(ghost)


def test_a_real_program_takes_transformers_assistants_and_saved_ones(llama: Any, tmp_path: Path) -> None:
    """All of it, once: compiled target and draft model, saved and loaded again."""
    small = noisy(llama, 0.3)
    small.save_pretrained(tmp_path / "small")
    passes = ["place_cache", f"speculate{{drafter=model(path={tmp_path / 'small'}),tokens=4}}"]
    draft_models._PROGRAMS[small] = ReferenceProgram(small)  # type: ignore[assignment]
    original = draft_models.draft_program
    want = llama.generate(IDS, max_new_tokens=16)

    def quick(model: Any) -> Any:
        return original(small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_models, "draft_program", quick)
        fast = graphwright.optimize(llama, passes=passes)
        assert torch.equal(fast.generate(IDS, max_new_tokens=16), want)
        assert fast.stats()["last"]["by_drafter"]["model"]["accepted"] > 0
        fast.save(tmp_path / "plan")
        again = graphwright.load(tmp_path / "plan", llama)
        assert torch.equal(again.generate(IDS, max_new_tokens=16), want)
        assert again.stats()["last"]["by_drafter"]["model"]["accepted"] > 0
    assert isinstance(fast.speculation.drafter, ModelDrafter)
    assert "draft_model" not in fast.memory()  # the stand-in keeps nothing
    fast.speculation.drafter.use(DraftModel(fast.program))
    memory = fast.memory()
    assert memory["draft_model"] >= memory["weights"] > 0
    assert memory["total"] == sum(held for kind, held in memory.items() if kind != "total")
    fast.speculation = None
    assert torch.equal(fast.generate(IDS, max_new_tokens=16, assistant_model=small), want)
    assert fast.stats()["last"]["by_drafter"]["model"]["accepted"] > 0
