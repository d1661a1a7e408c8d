"""Token trees: masks, depths and paths agree with their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation import Draft
from graphwright.runtime.speculation.draft import NO_DRAFT
from graphwright.runtime.speculation.tree import (
    MAX_TREE_TOKENS,
    ancestor_masks,
    chain,
    check_tree,
    children,
    depths,
    is_chain,
    pack,
    path_to,
)


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, MAX_TREE_TOKENS - 1))
    return [draw(st.integers(-1, index - 1)) for index in range(size)]


@given(trees())
def test_masks_depths_and_paths_agree(parents: list[int]) -> None:
    masks, levels = ancestor_masks(parents), depths(parents)
    assert masks[0] == 1 and len(masks) == len(parents) + 1
    for node in range(len(parents)):
        path = path_to(parents, node)
        assert path[-1] == node and len(path) == levels[node]
        assert all(parents[child] == parent for parent, child in zip([-1, *path], path, strict=False))
        seen = {bit for bit in range(64) if masks[node + 1] >> bit & 1}
        assert seen == {0, *(ancestor + 1 for ancestor in path)}
        assert -(2**63) <= masks[node + 1] < 2**63


@given(trees())
def test_children_invert_parents(parents: list[int]) -> None:
    tokens = list(range(100, 100 + len(parents)))
    links = children(tokens, parents)
    assert sorted(node for options in links for node in options.values()) == list(range(len(parents)))
    for place, options in enumerate(links):
        for token, node in options.items():
            assert parents[node] == place - 1 and tokens[node] == token


@given(st.lists(st.integers(0, 9), max_size=20))
def test_a_chain_is_a_tree_of_one_branch(tokens: list[int]) -> None:
    parents = chain(len(tokens))
    assert is_chain(parents) and depths(parents) == list(range(1, len(tokens) + 1))
    draft = Draft(tokens, parents)
    assert draft.parents is None
    assert draft.successors == children(tokens, parents)


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [([1, 2], [-1]), ([1], [0]), ([1, 2], [-1, 2]), ([1], [-2]), ([4, 4], [-1, -1]), ([1] * 63, chain(63))],
)
def test_bad_trees_are_refused(tokens: list[int], parents: list[int]) -> None:
    with pytest.raises(InputError):
        check_tree(tokens, parents)


def test_q_needs_a_chain() -> None:
    with pytest.raises(InputError, match="q needs"):
        Draft([1, 2], [-1, -1], torch.ones(2, 4))
    with pytest.raises(InputError, match="q needs"):
        Draft([1, 2], None, torch.ones(3, 4))


def test_pack_lays_out_chains_and_trees() -> None:
    cpu = torch.device("cpu")
    chains = pack([5, None, 7], [Draft([1, 2]), NO_DRAFT, NO_DRAFT], cpu)
    assert chains.tokens.tolist() == [[5, 1, 2], [0, 0, 0], [7, 0, 0]]
    assert chains.counts.tolist() == [3, 0, 1] and chains.depth is None and chains.tree is None
    mixed = pack([5, 6, None], [Draft([1, 2, 3], [-1, -1, 0]), Draft([8]), NO_DRAFT], cpu)
    assert mixed.tokens.tolist() == [[5, 1, 2, 3], [6, 8, 0, 0], [0, 0, 0, 0]]
    assert mixed.depth is not None and mixed.tree is not None
    assert mixed.depth.tolist() == [[0, 1, 1, 2], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert mixed.tree.tolist() == [[0b1, 0b11, 0b101, 0b1011], [0b1, 0b11, 0, 0], [0, 0, 0, 0]]
    assert mixed.tokens.dtype == mixed.tree.dtype == torch.int64
