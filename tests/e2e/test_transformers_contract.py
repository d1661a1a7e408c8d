"""forward(), score(), pipelines and lm-eval: the object stands where a stock model stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphwright.ir.errors import GraphwrightError, InputError, UnsupportedGenerationError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import Speculation, make_drafter
from tests.e2e.fake_program import VOCAB
from tests.e2e.test_generate import RAGGED, padded, repetitive

Make = Callable[..., OptimizedModel]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.tensor([repetitive(90)])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter: token 2 + i is the i-th of 59 characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(ord("A") + i) for i in range(58)] + [" "]
    vocab = {"<pad>": 0, "<s>": 1, **{letter: 2 + i for i, letter in enumerate(letters)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        padding_side="left",
        model_max_length=200,
    )


def test_forward_equals_stock(stock: Any, make_fast: Make) -> None:
    fast = make_fast(stock)
    got, want = fast(IDS), stock(IDS)
    assert isinstance(got, CausalLMOutputWithPast) and got.loss is None
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    assert not got.logits.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_with_padding(llama: Any, make_fast: Make, side: str) -> None:
    inputs = padded(RAGGED, side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = make_fast(llama)(**inputs, position_ids=positions).logits
    want = llama(**inputs, position_ids=positions).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    assert not got[~real].any()


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 7])], ids=["1", "5", "some"])
def test_logits_to_keep(llama: Any, make_fast: Make, keep: Any) -> None:
    got = make_fast(llama)(IDS, logits_to_keep=keep).logits
    torch.testing.assert_close(got, llama(IDS, logits_to_keep=keep).logits, **CLOSE)


def test_loss_equals_stock(llama: Any, make_fast: Make) -> None:
    labels = IDS.clone()
    labels[:, :10] = -100
    fast = make_fast(llama)
    torch.testing.assert_close(
        fast(IDS, labels=labels).loss, llama(IDS, labels=labels).loss.detach(), **CLOSE
    )
    items = torch.tensor(7)
    torch.testing.assert_close(
        fast(IDS, labels=labels, num_items_in_batch=items).loss,
        llama(IDS, labels=labels, num_items_in_batch=items).loss.detach(),
        **CLOSE,
    )
    with pytest.raises(InputError, match="labels"):
        fast(IDS, labels=labels, logits_to_keep=1)


def test_tuple_output(llama: Any, make_fast: Make) -> None:
    out = make_fast(llama)(IDS, use_cache=False, return_dict=False)
    assert isinstance(out, tuple) and len(out) == 1 and out[0].shape == (1, 90, VOCAB)


def test_token_by_token_with_the_cache(llama: Any, make_fast: Make) -> None:
    fast, want = make_fast(llama), llama(IDS).logits
    out = fast(IDS[:, :20], use_cache=True)
    torch.testing.assert_close(out.logits, want[:, :20], **CLOSE)
    for at in range(20, 90):  # long enough for the cache to grow
        assert out.past_key_values.get_seq_length() == at
        out = fast(IDS[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(out.logits, want[:, at : at + 1], **CLOSE)
    assert fast(IDS, use_cache=False).past_key_values is None


def test_ragged_cache_crop_and_whole_masks(llama: Any, make_fast: Make) -> None:
    inputs = padded(RAGGED, "left")
    fast, mask = make_fast(llama), inputs["attention_mask"]
    cache = fast(**inputs, use_cache=True).past_key_values
    more = torch.randint(2, VOCAB, (4, 3))
    whole = torch.cat((mask, torch.ones_like(more)), 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    want = llama(
        torch.cat((inputs["input_ids"], more), 1), attention_mask=whole, position_ids=positions
    ).logits
    for again in range(2):
        got = fast(more, attention_mask=whole if again else None, past_key_values=cache).logits
        torch.testing.assert_close(got, want[:, -3:], **CLOSE)
        cache.crop(-3)
        assert cache.get_seq_length() == mask.shape[1]
    with pytest.raises(InputError, match="extension"):
        fast(more, attention_mask=torch.ones_like(whole), past_key_values=cache)


def test_interrupted_forward_keeps_the_cache(llama: Any, make_fast: Make, monkeypatch: Any) -> None:
    fast = make_fast(llama)
    fast.program.max_step_tokens = 8
    cache = fast(IDS[:, :10], use_cache=True).past_key_values
    step, calls = fast.program.step, []

    def fail_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fast.program, "step", fail_second)
        with pytest.raises(KeyboardInterrupt):
            fast(IDS[:, 10:30], past_key_values=cache)
    assert cache.get_seq_length() == 10
    cache.crop(9)
    cache.crop(10)
    fast(IDS[:, 9:10], past_key_values=cache)
    got = fast(IDS[:, 10:30], past_key_values=cache).logits
    fast.program.max_step_tokens = 64
    torch.testing.assert_close(got, llama(IDS[:, :30]).logits[:, 10:], **CLOSE)


def test_forward_refusals(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    refused: dict[str, Any] = {
        "past_key_values": DynamicCache(),
        "output_attentions": True,
        "output_hidden_states": True,
        "inputs_embeds": torch.zeros(1, 2, 32),
        "position_ids": torch.arange(90)[None] + 4,
    }
    for name, value in refused.items():
        with pytest.raises(UnsupportedGenerationError, match=name):
            fast(IDS, **{name: value})
    with pytest.raises(InputError, match="no_such_thing"):
        fast(IDS, no_such_thing=1)
    with pytest.raises(InputError, match="token ids must be"):
        fast()
    cache = fast(IDS).past_key_values
    with pytest.raises(InputError, match="rows"):
        fast(IDS.expand(2, -1), past_key_values=cache)
    with pytest.raises(UnsupportedGenerationError, match="did not make"):
        make_fast(llama).program and OptimizedModel(
            object.__new__(type(fast.program)), config=llama.config, generation_config=llama.generation_config
        )._cache_for(cache, 1)
    for call in (cache.update, cache.reorder_cache, cache.reset):
        with pytest.raises(UnsupportedGenerationError):
            call()


@pytest.mark.parametrize("step", [1, 7, 32, 64])
def test_score_does_not_depend_on_the_step(llama: Any, make_fast: Make, step: int) -> None:
    got = make_fast(llama).score(IDS, step=step)
    assert got.shape == (1, 90, VOCAB)
    torch.testing.assert_close(got, llama(IDS).logits, **CLOSE)


def test_score_with_padding_and_bad_steps(llama: Any, make_fast: Make) -> None:
    fast, inputs = make_fast(llama), padded(RAGGED, "left")
    got = fast.score(inputs["input_ids"], attention_mask=inputs["attention_mask"], step=5)
    for row, prompt in enumerate(RAGGED):
        torch.testing.assert_close(got[row, -len(prompt) :], llama(torch.tensor([prompt])).logits[0], **CLOSE)
    for step in (0, 65):
        with pytest.raises(InputError, match="step"):
            fast.score(IDS, step=step)


def test_it_looks_like_a_model(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    assert fast.can_generate() and fast.eval() is fast and fast.train(False) is fast
    assert fast.to("cpu") is fast and fast.to(torch.float32) is fast
    assert fast.device == torch.device("cpu") and fast.dtype == torch.float32
    fast.config.vocab_size = 3
    assert llama.config.vocab_size == VOCAB
    for call in (lambda: fast.train(), lambda: fast.to("meta"), lambda: fast.to(torch.float64)):
        with pytest.raises(GraphwrightError):
            call()


@pytest.mark.parametrize("speculate", [False, True])
def test_text_generation_pipeline(llama: Any, make_fast: Make, tokenizer: Any, speculate: bool) -> None:
    fast = make_fast(llama, speculation=Speculation(make_drafter("ngram")) if speculate else None)
    prompts = ["ABCABCABD", "HELLO WORLD HELLO"]
    options = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}
    texts = []
    for model in (fast, llama):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts.append((generator(prompts, batch_size=2, **options), generator(prompts[0], **options)))
    assert texts[0] == texts[1] and len(texts[0][1][0]["generated_text"]) == 16


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings(llama: Any, make_fast: Make, tokenizer: Any, speculate: bool, length: int) -> None:
    fast = make_fast(
        llama, speculation=Speculation(make_drafter("ngram", min_ngram=1)) if speculate else None
    )
    inputs = tokenizer(["ABCABCABD", "HELLO WORLD HELLO"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    plain = llama.generate(**inputs, max_new_tokens=40)
    text = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
    options = {"max_new_tokens": 40, "tokenizer": tokenizer, "stop_strings": [text[20 : 20 + length]]}
    options |= {"eos_token_id": 1, "pad_token_id": 0}
    want = llama.generate(**inputs, **options)
    assert torch.equal(fast.generate(**inputs, **options), want)
    assert (want[0] == 0).any() or want.shape[1] < plain.shape[1]


def test_text_streamers(llama: Any, make_fast: Make, tokenizer: Any, capsys: Any) -> None:
    fast = make_fast(llama, speculation=Speculation(make_drafter("ngram", min_ngram=1)))
    inputs = tokenizer("ABCABCABD", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    want = tokenizer.decode(llama.generate(**inputs, max_new_tokens=30)[0])
    fast.generate(**inputs, max_new_tokens=30, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")
    pieces = TextIteratorStreamer(tokenizer)
    fast.generate(**inputs, max_new_tokens=30, streamer=pieces)
    assert "".join(pieces).rstrip("\n") == want.rstrip("\n")


def test_lm_eval_harness(llama: Any, make_fast: Make, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def requests(kind: str, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]

    pairs = [("ABCABC", "ABD"), ("HELLO", " WORLD"), ("A", "B")]
    until = [
        ("ABCABC", {"until": ["Q"], "max_gen_toks": 12}),
        ("HELLO", {"until": ["Z"], "max_gen_toks": 12}),
    ]
    results = []
    for model in (make_fast(llama), llama):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=100)
        scores = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        texts = harness.generate_until(requests("generate_until", until), disable_tqdm=True)
        results.append((scores, texts))
    assert results[0][1] == results[1][1]
    for (mine, greedy), (theirs, as_greedy) in zip(results[0][0], results[1][0], strict=True):
        assert greedy == as_greedy
        assert mine == pytest.approx(theirs, abs=1e-3)
