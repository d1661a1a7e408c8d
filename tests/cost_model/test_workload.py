import pytest

from graphwright.cost_model import Budget, Workload, parse_bytes
from graphwright.ir.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 * 2**30),
        ("512MiB", 512 * 2**20),
        ("40GB", 40 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("17", 17),
        (1024, 1024),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
    assert Budget(memory=text).memory_bytes == size


@pytest.mark.parametrize("bad", ["", "many", "40 GiBs", "-1GiB", 0, -5, "0GiB", float("nan"), True, None])
def test_what_is_no_size_is_refused(bad):
    with pytest.raises(InputError, match="what to do"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    "bad",
    [{"batch": 0}, {"prompt": 0}, {"generate": 0}, {"batch": 1.5}, {"batch": True}, {"shared_prefix": -1}],
)
def test_a_workload_of_nothing_is_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Workload(**bad)


def test_a_prefix_is_part_of_the_prompt():
    with pytest.raises(InputError, match="prefix"):
        Workload(prompt=10, shared_prefix=11)
    assert Workload(prompt=10, shared_prefix=10).shared_prefix == 10


def test_mean_context_is_the_mean_over_decode_steps():
    work = Workload(prompt=100, generate=5)
    contexts = [100 + step for step in range(work.decode_steps)]
    assert work.mean_context == sum(contexts) / len(contexts)
    assert work.capacity == 105
    assert Workload(prompt=100, generate=1).mean_context == 100


@pytest.mark.parametrize(
    "bad",
    [{"kl": 0}, {"kl": -1}, {"kl": float("inf")}, {"perplexity": 0.9}, {"latency": 0}, {"latency": "fast"},
     {"memory": 0}, {"memory": "lots"}],
)  # fmt: skip
def test_a_budget_of_nothing_is_refused(bad):
    with pytest.raises(InputError, match=f"Budget\\({next(iter(bad))}="):
        Budget(**bad)


def test_no_budget_allows_no_loss():
    assert not Budget().allows_loss
    assert not Budget(memory="1GiB", latency=0.1).allows_loss
    assert Budget(kl=0.01).allows_loss
    assert Budget(perplexity=1.0).allows_loss
    assert Budget().memory_bytes is None
