"""Drafters that look texts up: each against its definition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation import (
    Generation,
    Outcome,
)
from graphwright.runtime.speculation.automaton import SuffixAutomaton
from graphwright.runtime.speculation.corpus import END, read_corpus
from graphwright.runtime.speculation.drafters.copy import CopyDrafter
from graphwright.runtime.speculation.drafters.datastore import DatastoreDrafter
from graphwright.runtime.speculation.drafters.mix import taken
from graphwright.runtime.speculation.drafters.suffix import SuffixDrafter
from graphwright.runtime.speculation.suffix_array import Span, SuffixArray
from tests.e2e.fake_program import VOCAB
from tests.e2e.lookups import FEW, TEXT, TOKENS, answers, ends, longest

# --- suffix automaton ----------------------------------------------------------------------------


@FEW
@given(TEXT, TOKENS)
def test_the_automaton_finds_the_longest_suffix_of_every_path(text: list[int], path: list[int]) -> None:
    known = SuffixAutomaton()
    for end, token in enumerate(text):
        known.append(token)
        match, seen = known.repeated(), text[: end + 1]
        size = max(n for n in range(len(seen)) if n == 0 or len(ends(seen, seen[len(seen) - n :])) > 1)
        assert match.length == size
        earlier = ends(seen, seen[len(seen) - size :])[:-1]
        if size:
            assert set(known.followers(match)) == {seen[place] for place in earlier}
    assert known.size == len(text)
    for end in range(len(path)):
        match = known.follow(match, path[end])
        whole = text + path[: end + 1]
        # The text's own end is no earlier occurrence, but every other suffix of it is found.
        assert match.length == longest(text, whole, len(whole))
        shorter = known.shorter(match)
        places = ends(text, whole[len(whole) - match.length :])
        assert shorter.length == 0 or len(ends(text, whole[len(whole) - shorter.length :])) > len(places)


def test_followers_are_counted_where_no_longer_context_knew_them() -> None:
    known = SuffixAutomaton([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2])
    assert known.followers(known.repeated()) == {3: 2, 4: 1}  # behind 1 2
    assert list(known.followers(known.repeated())) == [3, 4]


def test_suffix_lists_longer_matches_first_and_remembers_what_was_written() -> None:
    guesser = SuffixDrafter(memory=14)
    guesser.begin(Generation([[1, 2, 3, 9, 2, 4, 7, 1, 2]]))
    assert [token for token, _ in answers(guesser)] == [3, 4]  # behind 1 2, then behind 2
    assert [token for token, _ in answers(guesser, [3])] == [9]
    guesser.observe(0, Outcome([5, 6, 5]))
    guesser.begin(Generation([[6], [5]]))
    assert [token for token, _ in answers(guesser)] == [5]
    assert [token for token, _ in answers(guesser, row=1)] == [6]  # never the end of a text
    for _ in range(3):  # more than it remembers
        guesser.observe(0, Outcome([10, 11, 12]))
        guesser.begin(Generation([[5], [10]]))
    assert answers(guesser) == [] and answers(guesser, row=1)[0][0] == 11
    forgetful = SuffixDrafter(memory=0)
    for _ in range(2):
        forgetful.begin(Generation([[1]]))
        assert answers(forgetful) == []
        forgetful.observe(0, Outcome([2, 3]))


# --- copying -------------------------------------------------------------------------------------


@FEW
@given(TEXT, TOKENS, st.integers(1, 3), st.integers(1, 4))
def test_copy_takes_a_block_from_behind_the_last_occurrence(
    prompt: list[int], more: list[int], gamma: int, block: int
) -> None:
    guesser = CopyDrafter(gamma=gamma, block=block)
    guesser.begin(Generation([prompt]))
    guesser.observe(0, Outcome(more))
    text = prompt + more
    places = ends(text, text[len(text) - gamma :])[:-1] if len(text) >= gamma else []
    want = text[places[-1] : places[-1] + block] if places else []
    assert list(guesser.propose([0], [9])[0].tokens) == want
    if want:
        assert answers(guesser, [7]) == []


# --- retrieval -----------------------------------------------------------------------------------


@FEW
@given(TEXT, TOKENS)
def test_a_suffix_array_finds_every_place(text: list[int], phrase: list[int]) -> None:
    array = SuffixArray(np.array(text))
    span: Span | None = array.everything
    for end in range(len(phrase) + 1):
        places = ends(text, phrase[:end])
        assert array.find(phrase[:end]) == (span if places else None)
        if span is None:
            break
        assert span.high - span.low == len([place for place in places if end or place < len(text)])
        counts = Counter(text[place] for place in places if place < len(text))
        assert dict(array.followers(span)) == counts
        span = array.narrow(span, phrase[end]) if end < len(phrase) else None


def test_samples_keep_the_shares_of_what_follows() -> None:
    array = SuffixArray(np.array([1, 2] * 60 + [1, 3] * 20), samples=8)
    found = array.find([1])
    assert found is not None
    assert array.followers(found) == [(2, 6), (3, 2)]


@FEW
@given(TEXT, TEXT, TOKENS, st.integers(1, 4))
def test_datastore_follows_the_longest_suffix(
    corpus: list[int], prompt: list[int], path: list[int], most: int
) -> None:
    guesser = DatastoreDrafter(path=__file__, longest=most, shortest=1)
    guesser._corpus = SuffixArray(np.array(corpus))
    guesser.begin(Generation([prompt]))
    state = guesser.root(0)
    for end in range(len(path) + 1):
        whole = prompt + path[:end]
        size = longest(corpus, whole, most)
        assert state.span.length == size
        counts = Counter(corpus[at] for at in ends(corpus, whole[len(whole) - size :]) if at < len(corpus))
        listed = [token for token, _ in taken(guesser.candidates(0, state), 9)]
        assert set(listed) == (set(counts) if size else set())
        assert [counts[token] for token in listed] == sorted(counts.values(), reverse=True)[: len(listed)]
        if end < len(path):
            state = guesser.follow(0, state, path[end])


# --- a corpus ------------------------------------------------------------------------------------


class Known:
    """A program of a model that was loaded from nowhere."""

    vocab_size = VOCAB
    config = LlamaConfig()


def test_corpora_are_ids_in_lines_or_arrays(tmp_path: Path) -> None:
    lines, array = tmp_path / "ids.jsonl", tmp_path / "ids.npy"
    lines.write_text("[1, 2]\n\n[]\n[3]\n", "utf-8")
    assert read_corpus(str(lines), None).tolist() == [1, 2, END, 3, END]
    np.save(array, np.array([[1, 2], [3, 4]], dtype=np.int32))
    assert read_corpus(str(array), Known()).tolist() == [1, 2, END, 3, 4, END]


def test_a_text_is_tokenized_as_the_model_does(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 4, "b": 5, "?": 6}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    program = Known()
    program.config = LlamaConfig(name_or_path=str(tmp_path))
    text, lines = tmp_path / "some.txt", tmp_path / "some.jsonl"
    text.write_text("a b\na c\n", "utf-8")
    lines.write_text('"a b"\n[7]\n', "utf-8")
    assert read_corpus(str(text), program).tolist() == [4, 5, 4, 6, END]
    assert read_corpus(str(lines), program).tolist() == [4, 5, END, 7, END]
    program.config = LlamaConfig(name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="none can be loaded"):
        read_corpus(str(text), program)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no tokens"),
        ("a.txt", b" \n", "no tokens"),
        ("a.npy", b"", "not an array"),
        ("a.npy", b"[1, 2]", "not an array"),
        ("a.jsonl", b"[1, 2", "not JSON"),
        ("a.jsonl", b'{"a": 1}', "neither a list"),
        ("a.jsonl", b"[1, 2.5]", "neither a list"),
        ("a.jsonl", b"[true]", "neither a list"),
        ("a.jsonl", b"[1, -1]", "token ids from -1"),
        ("a.jsonl", b"[1, 61]", "below 61"),
        ("a.txt", b"\xff\xfe\x00", "not a text"),
        ("a.txt", b"some text", "needs the model's tokenizer"),
        ("a.jsonl", b'"some text"', "needs the model's tokenizer"),
    ],
)
def test_bad_corpora_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for guesser in (DatastoreDrafter(path=str(tmp_path / name)), SuffixDrafter(corpus=str(tmp_path / name))):
        with pytest.raises(InputError, match=message):
            guesser.begin(Generation([[1]], Known()))
