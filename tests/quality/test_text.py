"""The text that quality is measured on."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from graphwright.ir.errors import InputError
from graphwright.optimizer.quality import calibration_text
from graphwright.optimizer.quality.prose import paragraphs, passage
from tests.architectures import POSITIONS, VOCAB, tiny_model

PRINTABLE = [chr(code) for code in range(32, 127)]
SENTENCE = "The quick brown fox jumps over the lazy dog."


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer that has one token for each of ``words``; text is split into characters."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def model_in(folder: Path, **options: Any) -> PreTrainedModel:
    """A tiny model that was loaded from ``folder``."""
    model = tiny_model("llama", **options)
    model.name_or_path = str(folder)
    return model


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A model with a tokenizer of printable characters: as many tokens as the model knows."""
    save_tokenizer(tmp_path, PRINTABLE)
    return model_in(tmp_path)


# --- embedded ------------------------------------------------------------------------------------


def test_prose_is_read_through_the_models_tokenizer(model: PreTrainedModel) -> None:
    """Rows of equal length that spell English sentences."""
    text = calibration_text(model, None, rows=3, tokens=120)
    assert text.source == "embedded" and text.note == ""
    assert [len(row) for row in text.rows] == [120, 120, 120]
    spelled = "".join(["?", *PRINTABLE][token] for token in text.rows[0])
    assert sum(c in string.ascii_letters + " " for c in spelled) > 100
    assert " the " in "".join(["?", *PRINTABLE][token] for row in text.rows for token in row)


def test_prose_is_a_seeded_choice(model: PreTrainedModel) -> None:
    """The same seed gives the same rows; another one gives others; no row repeats another."""
    first, again = (calibration_text(model, None, tokens=50) for _ in range(2))
    other = calibration_text(model, None, tokens=50, seed=1)
    assert first == again
    assert first.fingerprint != other.fingerprint and first.rows != other.rows
    assert len({tuple(row) for row in first.rows}) == 4


def test_rows_fit_the_models_positions(model: PreTrainedModel) -> None:
    """More tokens than positions are never asked of a model."""
    assert [len(row) for row in calibration_text(model, None, rows=1, tokens=10_000).rows] == [POSITIONS]


def test_prose_has_no_markup() -> None:
    """Paragraphs are sentences: no tables, code, grammar, headings or emphasis."""
    assert len(paragraphs()) > 100
    for text in paragraphs():
        assert text[-1] in ".:" and "\n" not in text and "  " not in text
        assert not any(mark in text for mark in (">>>", "::=", "====", "+---"))
    assert len(passage(0.99, 5_000)) >= 5_000  # goes on at the beginning
    assert passage(0.0, 10**9) == "\n\n".join(paragraphs())


# --- generated -----------------------------------------------------------------------------------


def test_without_a_tokenizer_the_model_writes_the_text() -> None:
    """Sampled rows are likelier under the model than random ones, and repeat for a seed."""
    model = tiny_model("llama", initializer_range=0.3)
    text = calibration_text(model, None, rows=4, tokens=100)
    assert text.source == "generated" and "tokenizer" in text.note
    assert text == calibration_text(model, None, rows=4, tokens=100)
    assert text.rows != calibration_text(model, None, rows=4, tokens=100, seed=1).rows
    written, noise = torch.tensor(text.rows), torch.randint(0, VOCAB, (4, 100))
    with torch.no_grad():
        assert model(written, labels=written).loss < model(noise, labels=noise).loss - 1
    assert (written[:, 0] == model.config.bos_token_id).all()
    assert not (written == model.config.eos_token_id).any()


def test_sampling_leaves_no_trace() -> None:
    """The global random state and the model's mode are as before."""
    model = tiny_model("llama").train()
    before = torch.get_rng_state()
    calibration_text(model, None, rows=2, tokens=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_model_without_a_first_token_starts_anywhere() -> None:
    """Rows start with random tokens where the configuration names none, or one that does not exist."""
    for missing in (None, VOCAB + 5):
        rows = calibration_text(tiny_model("llama", bos_token_id=missing), None, rows=8, tokens=20).rows
        assert len({row[0] for row in rows}) > 1


def test_a_model_without_weights_has_a_text_only_with_a_tokenizer(tmp_path: Path) -> None:
    """On the meta device: prose if there is a tokenizer, and no rows (with the reason) if not."""
    none = calibration_text(tiny_model("llama", device="meta"), None)
    assert none.rows == [] and "no weights" in none.note
    save_tokenizer(tmp_path, PRINTABLE)
    assert calibration_text(model_in(tmp_path, device="meta"), None, tokens=40).source == "embedded"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*PRINTABLE, "é"], "another vocabulary"),  # one more than the model knows
        (["é", "ü"], "does not know the words"),
        (None, "no tokenizer was found"),
    ],
    ids=["too many tokens", "another language", "damaged"],
)
def test_a_tokenizer_that_does_not_fit_is_left_aside(
    tmp_path: Path, words: list[str] | None, expected: str
) -> None:
    """The text is then the model's own, and says why."""
    save_tokenizer(tmp_path, words or PRINTABLE)
    if words is None:
        (tmp_path / "tokenizer.json").write_text('{"version": ')
    text = calibration_text(model_in(tmp_path), None, rows=2, tokens=30)
    assert text.source == "generated" and expected in text.note


# --- the caller's --------------------------------------------------------------------------------


def test_the_callers_rows_are_cut_and_kept_in_order() -> None:
    """Tensors and lists of any length; the note says what was left out."""
    model = tiny_model("llama")
    rows = [torch.arange(90), list(range(20)), torch.arange(50)[None]]
    text = calibration_text(model, rows, rows=4, tokens=64)
    assert text.source == "caller" and text.note == ""
    assert text.rows == [list(range(64)), list(range(20)), list(range(50))]
    fewer = calibration_text(model, rows, rows=2, tokens=64)
    assert fewer.rows == text.rows[:2] and fewer.note == "the first 2 of 3 rows"
    assert fewer.fingerprint != text.fingerprint
    matrix = calibration_text(model, torch.ones((2, 300), dtype=torch.int64), tokens=1000)
    assert [len(row) for row in matrix.rows] == [POSITIONS, POSITIONS]


def test_strings_go_through_the_models_tokenizer(model: PreTrainedModel) -> None:
    """A string is one row, and gives what its ids give."""
    ids = [PRINTABLE.index(c) + 1 for c in SENTENCE]
    text = calibration_text(model, [SENTENCE, ids])
    assert text.rows == [ids, ids]


def test_strings_need_a_tokenizer() -> None:
    """The error says what to pass."""
    with pytest.raises(InputError, match="tokenizer") as error:
        calibration_text(tiny_model("llama"), [list(range(20)), SENTENCE])
    assert error.value.where == "calibration[1]" and "input_ids" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("calibration", "expected", "where"),
    [
        ([], "empty", "calibration"),
        (["  \n"], "empty", "calibration[0]"),
        ([[]], "shape", "calibration[0]"),
        ([SENTENCE, "Too short."], "10 tokens, and at least 16", "calibration[1]"),
        ([list(range(15))], "15 tokens, and at least 16", "calibration[0]"),
        ([[VOCAB] * 20], f"outside the vocabulary of {VOCAB}", "calibration[0]"),
        ([[-1] * 20], "outside the vocabulary", "calibration[0]"),
        ([[0.5] * 20], "not integers", "calibration[0]"),
        (SENTENCE, "calibration is a str", "calibration"),
        ([SENTENCE.encode()], "not a sequence of token ids", "calibration[0]"),
        (17, "calibration is a int", "calibration"),
    ],
)
def test_unusable_text_is_refused(
    model: PreTrainedModel, calibration: Any, expected: str, where: str
) -> None:
    """What was wrong, and where."""
    with pytest.raises(InputError, match=expected) as error:
        calibration_text(model, calibration)
    assert error.value.where == where and error.value.hint
