"""Every registered drafter with every tree writes what the program writes without drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graphwright as gw
from graphwright.runtime.speculation import Drafter, FixedLength, PathDrafter, Speculation, parse_drafter
from graphwright.runtime.speculation.drafter import drafter_classes
from graphwright.runtime.speculation.skip_calibration import calibrate_skips, save_domains
from graphwright.runtime.speculation.trees.tree import TREES

VOCAB, LAYERS, NEW = 61, 3, 24
#: The longest prompt and its new tokens fill the model's positions.
POSITIONS = 48
LENGTHS = (24, 1, 9, 17, 3, 22, 12, 6)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Drafters that need to be told something; ``{folder}`` holds a small model, texts and calibrated domains.
OPTIONS = {
    "datastore": "datastore(path={folder}/texts.jsonl)",
    "knn_ssd": "knn_ssd(path={folder}/domains.json)",
    "model": "model(path={folder}/small)",
    "retokenized": "retokenized(path={folder}/small)",
    "retrieved": "retrieved(context=64)",
    "skip": "skip(layers=1)",
    "sparse": "sparse(page=4,recent=8)",
    "staged": "staged(path={folder}/small)",
}
#: Drafters that a program is lowered for, or that are given a model then.
LOWERED = ("model", "quantspec", "retokenized", "sparse", "staged")
#: What the cache has to be for a drafter.
CACHES = {"quantspec": "quantize_cache{codec=quantspec,page=16}"}


def pairs() -> list[tuple[str, str]]:
    """Every drafter with every tree that it takes."""
    found = []
    for name, cls in drafter_classes().items():
        trees = sorted(TREES.classes()) if issubclass(cls, PathDrafter) else ["chain"]
        found += [(name, tree) for tree in trees]
    return found


def llama(seed: int, **options: Any) -> LlamaForCausalLM:
    """A random model whose logits are far apart."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS,
        initializer_range=0.4, bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with a word for every token."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


class Setup:
    """A model, its programs and what they write without drafts, for one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        for name, seed in (("target", 7), ("small", 8)):
            llama(seed).to(dtype).save_pretrained(folder / name)
            words().save_pretrained(folder / name)
        self.model = LlamaForCausalLM.from_pretrained(folder / "target", dtype=dtype).eval()
        generator = torch.Generator().manual_seed(3)
        phrase = torch.randint(2, VOCAB, (5,), generator=generator).tolist()
        self.rows = [[phrase[(i + n) % 5] if i % 7 else 2 + i for i in range(n)] for n in LENGTHS]
        self._programs: dict[str, Any] = {}
        self._drafters: dict[str, Drafter] = {}
        (folder / "texts.jsonl").write_text("".join(json.dumps(row * 3) + "\n" for row in self.rows))
        domains = calibrate_skips(self.fast("ngram").program, {"all": self.rows[:2]}, count=1)
        save_domains(domains, folder / "domains.json")

    def fast(self, drafter: str, tree: str = "chain") -> Any:
        """A program with this speculation; one is lowered anew only for what lowering has to know of."""
        name = drafter if drafter in LOWERED else ""
        if name not in self._programs:
            cache = ["place_cache", *([CACHES[name]] if name in CACHES else [])]
            passes = [f"speculate{{drafter={self.text(name)}}}"] if name else []
            self._programs[name] = gw.optimize(self.model, "cpu", passes=[*cache, *passes])
        fast = self._programs[name]
        if name:
            self._drafters.setdefault(name, fast.speculation.drafter)
        guesser = self._drafters[name] if name else parse_drafter(self.text(drafter))
        fast.speculation = Speculation(guesser, FixedLength(12), tree=TREES.parse(tree))
        return fast

    def text(self, drafter: str) -> str:
        """The drafter with its options."""
        return OPTIONS.get(drafter, drafter).format(folder=self.folder)

    def generate(self, fast: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
        """New tokens of each row."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
        return out[:, width:].tolist()


@pytest.fixture(scope="module", params=DTYPES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    yield Setup(tmp_path_factory.mktemp(request.param), DTYPES[request.param])


@pytest.mark.parametrize(("drafter", "tree"), pairs())
def test_greedy_tokens_are_the_same(setup: Setup, drafter: str, tree: str) -> None:
    fast = setup.fast(drafter, tree)
    speculation, fast.speculation = fast.speculation, None
    want = setup.generate(fast, setup.rows)
    fast.speculation = speculation
    assert setup.generate(fast, setup.rows) == want
    # The last row alone; its own eighth token ends it, in the middle of what is drafted.
    stop = {"eos_token_id": want[-1][7], "pad_token_id": 0}
    alone = setup.generate(fast, setup.rows[-1:], **stop)
    assert alone[0] == want[-1][: want[-1].index(want[-1][7]) + 1]


def test_trees_over_attention_that_rounds_otherwise_are_reported(setup: Setup) -> None:
    """The packed target of ``quantspec`` attends by the reference body."""
    cache = ["place_cache", CACHES["quantspec"]]
    for drafter, tree, noted in (
        ("suffix", "greedy", True),
        ("suffix", "chain", False),
        ("lookahead", "chain", True),
    ):
        speculate = f"speculate{{drafter={drafter},tree={tree}}}"
        fast = gw.optimize(setup.model, "cpu", passes=[*cache, speculate])
        notes = [d.reason for d in fast.report.decisions if d.status.value == "fallback"]
        assert any("near-tie" in note for note in notes) is noted
