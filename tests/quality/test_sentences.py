"""Which tokens end a sentence."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graphwright.optimizer.quality.sentences import ending_tokens, sentence_ends
from tests.architectures import VOCAB, tiny_model

ENDING = [
    ".", "!", "?", "...", "…", "。", "？", "！", "．", "\n", "\n\n", "end.", '."', "!)", "?”", "。」",
    ". ", ".\n", "؟",
]  # fmt: skip
OTHER = [
    "the", " ", ",", ";", ":", ".the", "Mr.x", '"', ")", "」", "3", "，", "、", "</s>", "[UNK]",
]  # fmt: skip


def byte_level(word: str) -> str:
    """A word as tokens of bytes spell it: a printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    spelled = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return "".join(spelled[byte] for byte in word.encode())


def of_words(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that has one token for each word, spelled in bytes."""
    vocabulary = {byte_level(word): index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_tokens_end_a_sentence_with_its_mark_whatever_closes_after_it() -> None:
    words = [*ENDING, *OTHER]
    ends = ending_tokens(of_words(words), len(words) + 5)
    found = [word for word, end in zip(words, ends.tolist(), strict=False) if end]
    assert found == ENDING
    assert len(ends) == len(words) + 5 and not ends[len(words) :].any(), "what the tokenizer does not have"


def test_the_table_is_as_long_as_the_models_vocabulary(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert sentence_ends(model) is None, "no tokenizer, no table"
    of_words(["a", ".", "[UNK]"]).save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    ends = sentence_ends(model)
    assert ends is not None and ends.nonzero().flatten().tolist() == [1] and len(ends) == VOCAB
