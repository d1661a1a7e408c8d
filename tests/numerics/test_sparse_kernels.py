"""The kernels of sparse attention: lists equal to the reference's, what they read, and their bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from tests.numerics import inputs
from tests.numerics import sparse_inputs as sparse
from tests.numerics.inputs import after_append, step
from tests.numerics.test_kernels import DTYPES, TOLERANCE
from tests.numerics.test_kernels_bits import one_token
from tests.numerics.test_packed_attention import wide as wide_packed

TURNED = ("random_rotation >> token_norm >> lloyd_max(bits=3)", "hadamard >> token_range >> uniform(bits=4)")
LISTS = ("pages", "chosen", "page", "first")


def cpp(op_name: str, **arguments: Any) -> Any:
    """The C++ kernel's result; fails where another would run."""
    kernel = registry.select(op_name, "cpu", **arguments)
    assert kernel.provider == "cpp", kernel.reason
    return kernel.op(**arguments)


def same_lists(arguments: dict[str, Any]) -> None:
    """The kernel chooses what the reference chooses."""
    mine, count = cpp("choose_pages", **arguments)
    lists, chosen = SEMANTIC_OPS["choose_pages"].overload(**arguments)
    assert torch.equal(count, chosen)
    valid = torch.arange(lists.shape[3]) < chosen[..., None]
    assert torch.equal(mine[valid], lists[valid])


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- choosing ------------------------------------------------------------------------------------


def test_lists_are_those_of_the_reference() -> None:
    for _, arguments in sparse.choose_cases(torch.float32):
        same_lists(arguments)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_lists_of_random_steps(data: st.DataObject) -> None:
    draw = data.draw
    tokens = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 900), min_size=1, max_size=3))
    arguments = sparse.choose_step(
        tokens=tokens,
        lengths=lengths,
        dense=[draw(st.integers(0, tokens)) for _ in lengths],
        page=draw(st.sampled_from([1, 5, 16])),
        first=draw(st.sampled_from([0, 4, 30])),
        recent=draw(st.integers(0, 60)),
        settled=draw(st.integers(0, 30)),
        groups=draw(st.integers(1, 3)),
        sinks=draw(st.integers(0, 3)),
        keep=draw(st.sampled_from([0.0, 0.1, 0.125, 0.5, 1.0])),
        share=draw(st.sampled_from([0.0, 0.0, 0.3, 0.75, 1.0])),
    )
    same_lists(arguments)


def test_equal_scores_zeros_of_both_signs_and_tensors_that_are_too_small() -> None:
    arguments = sparse.choose_step(tokens=2, lengths=[700, 650])
    for scores in (torch.zeros_like(arguments["scores"]), torch.full_like(arguments["scores"], 0.5)):
        same_lists({**arguments, "scores": scores})
        scores[..., ::3] *= -1.0 if not scores.any() else 1.0
        same_lists({**arguments, "scores": scores})
    same_lists({**arguments, "scores": arguments["scores"][..., :20]})


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_that_are_no_candidates_never_show(dtype: torch.dtype) -> None:
    for selector in ("bounds", "mean"):
        arguments = sparse.score_step(dtype, selector, tokens=3, lengths=[400, 100, 6])
        clean = cpp("score_pages", **arguments)
        for row, length in enumerate((400, 100, 6)):
            arguments["summary"][0][row, max(0, length + 3 - 32) // 16 :] = torch.nan
        assert torch.equal(cpp("score_pages", **arguments), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_are_not_listed_never_show(dtype: torch.dtype) -> None:
    arguments = after_append(step(dtype, tokens=1, lengths=[500, 90], slots=520))
    arguments = sparse.with_lists(arguments, 2, first=4, page=16)
    clean = cpp("cache_attention", **copy.deepcopy(arguments))
    assert bool((arguments["chosen"][0] < 12).all())
    for row in range(2):
        for group in range(2):
            listed = arguments["pages"][row, 0, group, : arguments["chosen"][row, 0, group]]
            number = torch.arange(520)
            unread = (number >= 4) & ~torch.isin((number - 4) // 16, listed)
            for name in ("keys", "values"):
                arguments[name][row, group, unread] = torch.nan
    found = cpp("cache_attention", **arguments)
    assert torch.equal(found, clean) and not found.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_of_all_pages_are_dense_attention(dtype: torch.dtype) -> None:
    arguments = after_append(step(dtype, tokens=3, lengths=[150, 40], sinks=True))
    listed = sparse.with_lists(arguments, 2, keep=1.0, first=4)
    absolute, relative = TOLERANCE[dtype]
    found, dense = cpp("cache_attention", **listed), cpp("cache_attention", **arguments)
    torch.testing.assert_close(found, dense, atol=absolute, rtol=relative)
    everything = {**listed, "chosen": torch.full_like(listed["chosen"], -1)}
    assert torch.equal(cpp("cache_attention", **everything), dense)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_listed_attention_over_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    dtype, tokens = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 9))
    groups = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    shape = dict(
        tokens=tokens,
        lengths=lengths,
        counts=[draw(st.integers(0, tokens)) for _ in lengths],
        heads=(groups * draw(st.sampled_from([1, 3, 20])), groups),
        tree=draw(st.booleans()),
        sinks=draw(st.booleans()),
    )
    lists = dict(
        page=draw(st.sampled_from([1, 7, 16, 32, 130])),
        first=draw(st.sampled_from([0, 1, 4, 40])),
        dense=[draw(st.integers(0, tokens)) for _ in lengths],
    )
    absolute, relative = TOLERANCE[dtype]
    if draw(st.booleans()):
        dims = (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
        arguments = after_append(step(dtype, dims=dims, slots=320, **shape))
        arguments = sparse.with_lists(arguments, groups, **lists)
        wide = {
            name: x.double().nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
        expected = SEMANTIC_OPS["cache_attention"].overload(**wide)
        found = cpp("cache_attention", **arguments)
    else:
        lags = (draw(st.integers(0, 40)), draw(st.integers(0, 40)))
        codecs = draw(st.sampled_from([sparse.PLAIN, TURNED, (sparse.PLAIN[0], TURNED[1])]))
        arguments = sparse.listed_packed_step(dtype, codecs, lags=lags, **shape, **lists)
        expected = SEMANTIC_OPS["packed_attention"].overload(**wide_packed(arguments)).double()
        found = cpp("packed_attention", **arguments)
    torch.testing.assert_close(found.double(), expected, atol=absolute + 1e-5, rtol=relative)


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_a_token_alone_and_in_a_step(dtype: torch.dtype, threads: None) -> None:
    for selector in ("bounds", "mean"):
        arguments = sparse.score_step(
            dtype, selector, tokens=8, lengths=[400, 1100], heads=(9, 3), settled=5, recent=13
        )
        together = cpp("score_pages", **arguments)
        for t in range(8):
            own = {**arguments, "q": arguments["q"][:, :, t : t + 1], "counts": torch.ones(2).long()}
            own["positions"], own["lengths"] = own["positions"][:, t : t + 1], own["lengths"] + t
            assert torch.equal(cpp("score_pages", **own)[:, 0], together[:, t]), t
        row = {name: x[1:] for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        alone = {**arguments, **row, "summary": [arguments["summary"][0][1:]]}
        assert torch.equal(cpp("score_pages", **alone)[0], together[1])
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpp("score_pages", **arguments), together), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lists", [dict(), dict(keep=1.0), dict(page=11, first=3), dict(first=4, page=32)], ids=str
)
def test_listed_attention_of_a_token_alone_and_in_a_step(
    lists: dict[str, Any], dtype: torch.dtype, threads: None
) -> None:
    before = step(dtype, tokens=8, lengths=[280, 40], heads=(9, 3), sinks=True)
    arguments = sparse.with_lists(after_append(before), 3, dense=[2, 5], **lists)
    together = cpp("cache_attention", **arguments)
    for t in range(8):
        own = after_append(one_token(before, t))
        own.update({name: arguments[name] for name in LISTS})
        own["pages"], own["chosen"] = own["pages"][:, t : t + 1], own["chosen"][:, t : t + 1]
        assert torch.equal(cpp("cache_attention", **own)[:, 0], together[:, t]), t
    dense = cpp("cache_attention", **{k: v for k, v in arguments.items() if k not in LISTS})
    assert torch.equal(together[0, :2], dense[0, :2]) and torch.equal(together[1, :5], dense[1, :5])
    for name in ("q", "keys", "values", "positions", "lengths", "counts", "tree", "pages", "chosen"):
        own[name] = arguments[name][1:]
    assert torch.equal(cpp("cache_attention", **own)[0], together[1])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpp("cache_attention", **arguments), together), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codecs", [sparse.PLAIN, TURNED], ids=("plain", "turned"))
def test_listed_packed_attention_of_a_token_alone_and_in_a_step(
    codecs: tuple[str, str], dtype: torch.dtype, threads: None
) -> None:
    arguments = sparse.listed_packed_step(
        dtype, codecs, tokens=8, lengths=[460, 140], heads=(6, 2), first=4, dense=[3, 0]
    )
    together = cpp("packed_attention", **arguments)
    for t in range(8):
        own = {**arguments, "q": arguments["q"][:, :, t : t + 1], "counts": torch.ones(2).long()}
        own["positions"], own["lengths"] = own["positions"][:, t : t + 1], own["lengths"] + t
        own["pages"], own["chosen"] = own["pages"][:, t : t + 1], own["chosen"][:, t : t + 1]
        assert torch.equal(cpp("packed_attention", **own)[:, 0], together[:, t]), t
    dense = cpp("packed_attention", **{k: v for k, v in arguments.items() if k not in LISTS})
    assert torch.equal(together[0, :3], dense[0, :3]) and not torch.equal(together[0, 3:], dense[0, 3:])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpp("packed_attention", **arguments), together), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [[0, 0], [0, 12], [5, 0]], ids=str)
def test_a_path_of_a_tree_with_lists_and_a_chain(dense: list[int], dtype: torch.dtype) -> None:
    arguments = after_append(step(dtype, tokens=12, lengths=[275, 120], heads=(9, 3)))
    arguments = inputs.random_trees(sparse.with_lists(arguments, 3, dense=dense, first=4))
    together = cpp("cache_attention", **arguments)
    for row, t, path in inputs.paths(arguments):
        own = inputs.path_step(arguments, row, path)
        for store in ("keys", "values"):
            own[store] = inputs.move_path(own[store], own["lengths"], path)
        assert torch.equal(cpp("cache_attention", **own)[0, -1], together[row, t]), (row, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codecs", [sparse.PLAIN, TURNED], ids=("plain", "turned"))
def test_a_path_of_a_tree_with_packed_lists_and_a_chain(codecs: tuple[str, str], dtype: torch.dtype) -> None:
    arguments = sparse.listed_packed_step(
        dtype, codecs, tokens=12, lengths=[460, 140], heads=(6, 2), first=4, dense=[3, 0]
    )
    arguments = inputs.random_trees(arguments)
    together = cpp("packed_attention", **arguments)
    for row, t, path in inputs.paths(arguments):
        own = inputs.path_step(arguments, row, path)
        for store in ("keys", "values"):
            own[store][1] = inputs.move_path(own[store][1], own["lengths"], path)
        assert torch.equal(cpp("packed_attention", **own)[0, -1], together[row, t]), (row, t)


# --- what is refused -----------------------------------------------------------------------------


def test_other_arguments_run_the_reference_and_say_why() -> None:
    scored = sparse.score_step(torch.bfloat16, "bounds", tokens=1, lengths=[300])
    attended = dict(next(iter(sparse.listed_cases(torch.bfloat16)))[1])
    packed = dict(next(iter(sparse.listed_packed_cases(torch.bfloat16)))[1])
    for op_name, arguments, changes, said in (
        ("score_pages", scored, dict(q=scored["q"].half()), "not float32 or bfloat16"),
        ("score_pages", scored, dict(summary=[scored["summary"][0].float()]), "the summary"),
        ("score_pages", scored, dict(summary=[scored["summary"][0].mT.contiguous().mT]), "not contiguous"),
        ("cache_attention", attended, dict(window=400), "a window"),
        ("cache_attention", attended, dict(chosen=None), "come with their lengths"),
        ("cache_attention", attended, dict(pages=attended["pages"].long()), "not int32"),
        ("packed_attention", packed, dict(page=8), "listed pages are of 8 tokens"),
        ("packed_attention", packed, dict(first=3), "tokens after 3"),
    ):
        kernel = registry.select(op_name, "cpu", **{**arguments, **changes})
        assert kernel.provider == "reference" and said in kernel.reason, kernel.reason


def test_bad_lists_raise_and_do_not_crash() -> None:
    arguments = dict(next(iter(sparse.listed_cases(torch.float32)))[1])
    op = registry.select("cache_attention", "cpu", **arguments).op
    pages, chosen = arguments["pages"].clone(), arguments["chosen"]
    pages[0, 0, 1, 0] = -5
    for changes, said in (
        (dict(pages=pages), "list 1 of .* not ascending"),
        (dict(pages=arguments["pages"].flip(3)), "not ascending"),
        (dict(chosen=chosen + 100), "too long"),
        (dict(chosen=chosen[:, :, :1]), "lengths"),
        (dict(page=0), "pages of 0 tokens"),
        (dict(lengths=arguments["lengths"] + 10**6), "slots"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(**{**arguments, **changes})
