"""The cache of tuned configurations: what is kept, when it is used, and damage."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace

import pytest
import torch

from graphwright.kernels.triton import configs, tuning
from graphwright.kernels.triton.configs import (
    AttendConfig,
    AttendShape,
    attend_config,
    candidates,
    planned_device,
)
from graphwright.kernels.triton.tuning import NOISE, Key, attend_key, tune, tune_attention, tuned

KEY = Key("some", "a device", {"rows": 3})
PLAIN, SECOND, THIRD = (AttendConfig(16, n, 128, 4, 2) for n in (16, 32, 64))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path))
    configs.forget()
    yield tmp_path
    configs.forget()


def shape(**given):
    usual = {
        "batch": 1, "groups": 2, "group": 4, "tokens": 1, "key_width": 64, "value_width": 64, "slots": 4096,
        "page": 64, "key_bytes": 34.0, "value_bytes": 34.0, "dtype": torch.float16, "codecs": ("one", "two"),
    }  # fmt: skip
    return AttendShape(device=planned_device("h100"), **{**usual, **given})


def timed(seconds):
    """A runner and a timer by which configurations take these seconds; None fails."""
    ran = []

    def runner(config):
        return lambda: config

    def timer(call):
        ran.append(call())
        if seconds[ran[-1]] is None:
            raise RuntimeError(f"out of resources: {ran[-1].block_n}")
        return seconds[ran[-1]]

    return runner, timer, ran


def test_the_fastest_is_kept():
    runner, timer, ran = timed({PLAIN: 3.0, SECOND: 1.0, THIRD: 2.0})
    assert tune(runner, [PLAIN, SECOND, THIRD], KEY, timer=timer) == SECOND
    assert ran == [PLAIN, SECOND, THIRD]
    assert tuned(KEY) == SECOND
    assert json.loads(KEY.path.read_text())["seconds"] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(("first", "winner"), [(NOISE - 0.001, PLAIN), (NOISE + 0.001, SECOND)])
def test_the_predicted_one_stays_within_noise(first, winner):
    runner, timer, _ = timed({PLAIN: first, SECOND: 1.0, THIRD: 1.001})
    assert tune(runner, [PLAIN, SECOND, THIRD], KEY, timer=timer) == winner


def test_only_the_first_few_are_timed():
    runner, timer, ran = timed({PLAIN: 2.0, SECOND: 2.0, THIRD: 1.0})
    assert tune(runner, [PLAIN, SECOND, THIRD], KEY, timer=timer, most=2) == PLAIN
    assert ran == [PLAIN, SECOND]


def test_what_does_not_run_is_passed_over():
    runner, timer, _ = timed({PLAIN: None, SECOND: None, THIRD: 1.0})
    assert tune(runner, [PLAIN, SECOND, THIRD], KEY, timer=timer) == THIRD
    runner, timer, _ = timed({PLAIN: None, SECOND: None})
    with pytest.raises(RuntimeError, match="out of resources: 16"):
        tune(runner, [PLAIN, SECOND], replace(KEY, kernel="other"), timer=timer)
    assert tuned(replace(KEY, kernel="other")) is None


def test_the_key_is_all_that_matters(monkeypatch):
    """Another kernel, device, size, Triton or source is another key; the tokens of a step are not."""
    tuning.store(KEY, THIRD)
    assert tuned(KEY) == THIRD
    others = [replace(KEY, kernel="other"), replace(KEY, device="another"), replace(KEY, sizes={"rows": 4})]
    assert [tuned(key) for key in others] == [None] * 3
    for name in ("_triton_version", "source_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, name, lambda: "changed")
            assert tuned(KEY) is None
    assert attend_key(shape(tokens=8)) == attend_key(shape())
    different = {"slots": 8192, "page": 32, "dtype": torch.bfloat16, "codecs": ("one", "three"), "batch": 2}
    assert all(attend_key(shape(**{k: v})) != attend_key(shape()) for k, v in different.items())


def edit(text, **changes):
    data = json.loads(text)
    return json.dumps({**data, "config": {**data["config"], **changes}})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("tuned/1", "tuned/2"),
        lambda text: text.replace('"rows": 3', '"rows": 5'),
        lambda text: edit(text, chunk=0),
        lambda text: edit(text, chunk="128"),
        lambda text: edit(text, chunk=True),
        lambda text: edit(text, more=1),
        lambda text: json.dumps({**json.loads(text), "config": [1, 2]}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_counts_as_absent_and_is_written_anew(damage):
    tuning.store(KEY, THIRD)
    KEY.path.write_text(damage(KEY.path.read_text()), encoding="latin-1")
    assert tuned(KEY) is None
    runner, timer, _ = timed({PLAIN: 2.0, SECOND: 1.0})
    tune(runner, [PLAIN, SECOND], KEY, timer=timer)
    assert tuned(KEY) == SECOND


def test_a_folder_that_cannot_be_written_only_forgets(folder):
    (folder / "kernels").write_text("a file where a folder is wanted")
    runner, timer, _ = timed({PLAIN: 2.0, SECOND: 1.0})
    assert tune(runner, [PLAIN, SECOND], KEY, timer=timer) == SECOND
    assert tuned(KEY) is None


def test_writers_and_readers_do_not_wait_for_one_another(folder):
    """Every reader sees one writer's whole file, and nothing temporary is left."""
    tuning.store(KEY, PLAIN)
    seen, stop = set(), threading.Event()

    def write(config):
        for _ in range(50):
            tuning.store(KEY, config)

    def read():
        while not stop.is_set():
            seen.add(tuned(KEY))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(c,)) for c in (SECOND, THIRD)]
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert None not in seen and seen <= {PLAIN, SECOND, THIRD}
    assert [path.name for path in KEY.path.parent.iterdir()] == [KEY.path.name]


# --- attention -----------------------------------------------------------------------------------


def test_what_was_found_is_used():
    """For steps of any length, with the rows that each needs."""
    predicted, other = candidates(shape())[0], candidates(shape())[3]
    assert attend_config(shape()) == predicted != other
    tuning.store(attend_key(shape()), other)
    assert attend_config(shape()) == other
    assert attend_config(shape(tokens=8)) == replace(other, block_m=32)
    assert attend_config(shape(slots=8192)) == candidates(shape(slots=8192))[0]


@pytest.mark.parametrize("change", [{"chunk": 96}, {"block_n": 128}, {"block_n": 48}, {"num_warps": 3}])
def test_what_the_kernel_would_not_take_is_not_used(change):
    tuning.store(attend_key(shape()), replace(candidates(shape())[0], **change))
    assert attend_config(shape()) == candidates(shape())[0]


@dataclass
class Step:
    """Runs two attentions, and knows which configurations they had."""

    shapes: tuple[AttendShape, ...]
    used: tuple[AttendConfig, ...] = ()

    def __call__(self):
        self.used = tuple(attend_config(s) for s in self.shapes)


def test_each_attention_of_a_step_is_tuned_by_itself():
    first, second = shape(), shape(slots=8192)
    step = Step((first, second, first))
    wanted = {s: candidates(s)[2] for s in (first, second)}

    def timer(call):
        call()
        return sum(1.0 if used == wanted[s] else 2.0 for s, used in zip(step.shapes, step.used, strict=True))

    assert tune_attention(step, timer=timer) == wanted
    step()
    assert step.used == (wanted[first], wanted[second], wanted[first])
    # A second time nothing is left to time.
    assert tune_attention(step, timer=lambda call: pytest.fail("timed again")) == wanted


def test_the_kernel_asks_for_its_configuration():
    """In the interpreter: an attention is tuned by what it asks for, and its result stays the same."""
    pytest.importorskip("triton")
    from graphwright.kernels.triton.attention_ops import cache_attention

    torch.manual_seed(0)
    q, keys, values = (torch.randn(1, heads, n, 32).half() for heads, n in ((4, 1), (2, 300), (2, 300)))
    number = torch.tensor([250])
    results = []

    def run():
        tree = torch.zeros(1, 0, dtype=torch.int64)
        results.append(
            cache_attention(q, keys, values, number[:, None], number, torch.tensor([1]), tree, 0.2)
        )

    seconds = iter([5.0, 1.0, 5.0])

    def timer(call):
        call()
        return next(seconds)

    ((asked, found),) = tune_attention(run, timer=timer, most=3).items()
    assert (asked.slots, asked.groups, asked.group, asked.page) == (300, 2, 2, 0)
    assert found == candidates(asked)[1] != candidates(asked)[0]
    run()
    assert len(results) == 5 and torch.equal(results[-1], results[2])
    for other in results:
        torch.testing.assert_close(other, results[0], atol=2e-3, rtol=2e-3)
