"""Programs for testing the decode loop without a compiler.

``ReferenceProgram`` runs any transformers model by recomputing whole sequences row by row in float32:
slow, and right by construction. ``TableProgram`` looks logits up by the last token: fast, for statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 61


def tiny_model(name: str, **overrides: Any) -> Any:
    """A random two-layer model in float32; logits far enough apart that argmax is stable."""
    torch.manual_seed(7)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            **overrides,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **overrides,
    )
    return GPT2LMHeadModel(config).eval()


class OwnStates:
    """A program whose states are used once."""

    runs_ahead = False
    refresh = 0
    shared_prefix = None

    def borrow(self, batch: int, capacity: int, prefix: int = 0) -> Any:
        return self.allocate(batch, capacity)  # type: ignore[attr-defined]

    def give_back(self, state: Any) -> None:
        pass

    def free_idle(self) -> bool:
        return False


class ReferenceState:
    """Committed tokens of each row, and the last step's tokens until they are committed."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.ahead = [0] * batch
        self.pending: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([len(row) for row in self.rows])

    def commit(self, accepted: torch.Tensor, known: Any = None) -> None:
        for row, pending, count in zip(self.rows, self.pending, accepted.tolist(), strict=True):
            assert count <= len(pending)
            row.extend(pending[:count])
            del pending[:count]

    def commit_path(self, path: torch.Tensor, accepted: torch.Tensor, known: Any = None) -> None:
        for row, pending, nodes, count in zip(
            self.rows, self.pending, path.tolist(), accepted.tolist(), strict=True
        ):
            row.extend(pending[node] for node in nodes[:count])
        self.pending = [[] for _ in self.rows]

    def truncate(self, lengths: torch.Tensor) -> None:
        self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]

    def end_prompt(self, prompts: Any = None) -> None:
        pass

    def advance(self, tokens: list[int]) -> None:
        self.commit(torch.tensor(tokens))
        self.ahead = [ahead + count for ahead, count in zip(self.ahead, tokens, strict=True)]

    def retreat(self) -> None:
        """What was advanced stays where it is until the next step, and can be committed."""
        for row, pending, count in zip(self.rows, self.pending, self.ahead, strict=True):
            cut = len(row) - count
            pending[:] = row[cut:]
            del row[cut:]
        self.ahead = [0] * self.batch

    def room(self) -> list[int]:
        return [self.capacity] * self.batch


class ReferenceProgram(OwnStates):
    """The program protocol over a transformers model, without any cache."""

    max_step_tokens = 64

    def __init__(self, model: Any, max_step_tokens: int = 64) -> None:
        self.model = model.eval()
        self.config = model.config
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.vocab_size = model.config.vocab_size
        self.max_positions = model.config.max_position_embeddings
        self.max_step_tokens = max_step_tokens
        self.steps = 0
        self.widths: list[list[int]] = []

    def allocate(self, batch: int, capacity: int) -> ReferenceState:
        return ReferenceState(batch, capacity)

    def _run(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()

    def step(
        self,
        state: ReferenceState,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        *,
        depth: torch.Tensor | None = None,
        tree: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        logits: str = "all",
    ) -> torch.Tensor:
        assert tokens.dtype == counts.dtype == torch.int64
        assert tokens.shape[1] <= self.max_step_tokens
        self.steps += 1
        self.widths.append(counts.tolist())
        out = torch.full((*tokens.shape, self.vocab_size), float("nan"))
        for row, (ids, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
            past, new = state.rows[row], ids[:count]
            assert len(past) + count <= state.capacity, "the step does not fit the cache"
            state.pending[row] = new
            if tree is None and count:
                out[row, :count] = self._run(past + new)[len(past) :]
            for node in range(count if tree is not None else 0):
                assert depth is not None and tree is not None
                seen = [other for other in range(count) if int(tree[row, node]) >> other & 1]
                assert int(depth[row, node]) == len(seen) - 1
                out[row, node] = self._run(past + [new[other] for other in seen])[-1]
        return out if logits == "all" else out[torch.arange(len(counts)), counts - 1][:, None]

    def prefill(self, state: ReferenceState, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        out = []
        for row, (ids, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
            state.rows[row].extend(ids[:count])
            assert len(state.rows[row]) <= state.capacity
            out.append(self._run(state.rows[row])[-1])
        return torch.stack(out)


class TableState:
    """Counts committed tokens; a table program needs no more."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def commit(self, accepted: torch.Tensor, known: Any = None) -> None:
        self.lengths += accepted

    def commit_path(self, path: torch.Tensor, accepted: torch.Tensor, known: Any = None) -> None:
        self.lengths += accepted

    def truncate(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def advance(self, tokens: list[int]) -> None:
        """Nothing to do: no logits depend on what was read before."""

    def retreat(self) -> None:
        """Nothing to do."""

    def end_prompt(self, prompts: Any = None) -> None:
        pass

    def room(self) -> list[int]:
        return [self.capacity] * self.batch


class TableProgram(OwnStates):
    """A Markov chain: the logits after a token are a row of ``table [V, V]``."""

    max_step_tokens = 64
    max_positions = None

    def __init__(self, table: torch.Tensor, config: Any = None) -> None:
        self.table, self.config = table, config
        self.device, self.dtype, self.vocab_size = torch.device("cpu"), table.dtype, table.shape[1]

    def allocate(self, batch: int, capacity: int) -> TableState:
        return TableState(batch, capacity)

    def step(self, state: TableState, tokens: torch.Tensor, counts: torch.Tensor, **kw: Any) -> torch.Tensor:
        return self.table[tokens]

    def prefill(self, state: TableState, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        state.lengths += counts
        return self.table[tokens[torch.arange(len(counts)), counts - 1]]
