"""The file of measured sensitivities: shared, damaged, interrupted, unwritable."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.optimizer.quality import Sensitivity, SensitivityStore, store_key
from graphwright.optimizer.quality.store import code_version
from tests.quality.rounded_cache import Lab, RoundCache

ENTRIES = {"a|p": Sensitivity(0.5, -0.01), "b|p{bits=2}": Sensitivity(math.inf, math.inf, 4)}


def write(folder: Path, name: str) -> None:
    """Twenty entries, one write each."""
    store = SensitivityStore("key", folder)
    for index in range(20):
        store.add({f"{name}.{index}|p": Sensitivity(index, 0.0)})


@pytest.fixture
def store(tmp_path: Path) -> SensitivityStore:
    """A file with two entries."""
    made = SensitivityStore("key", tmp_path)
    made.add(ENTRIES)
    return made


def test_entries_come_back(store: SensitivityStore) -> None:
    """Infinite ones too; more are added to those that are there."""
    assert store.read() == ENTRIES
    store.add({"c|p": Sensitivity(0.0, 0.0)})
    assert SensitivityStore("key", store.folder).read() == ENTRIES | {"c|p": Sensitivity(0.0, 0.0)}
    assert SensitivityStore("other", store.folder).read() == {}


def test_a_sites_own_measurement_stays(store: SensitivityStore) -> None:
    """A shared one does not replace it; its own replaces a shared one."""
    store.add({"a|p": Sensitivity(0.7, 0.0, 2), "b|p{bits=2}": Sensitivity(0.1, 0.0, 1)})
    assert store.read() == {"a|p": ENTRIES["a|p"], "b|p{bits=2}": Sensitivity(0.1, 0.0, 1)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.5", "0.4"),
        lambda text: text.replace("sensitivities/1", "sensitivities/0"),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: '{"schema": "graphwright.sensitivities/1", "sha256": "", "entries": 3}',
        lambda text: "\x00" * len(text),
    ],
    ids=["empty", "cut off", "edited", "another version", "a list", "no fields", "no entries", "zeros"],
)
def test_a_damaged_file_is_measured_again(store: SensitivityStore, damage: object) -> None:
    """It reads as empty, and the next write makes it whole."""
    assert callable(damage)
    store.path.write_text(damage(store.path.read_text()))
    assert store.read() == {}
    store.add(ENTRIES)
    assert store.read() == ENTRIES


@pytest.mark.parametrize(
    "fields", [{"kl": -1.0}, {"kl": math.nan}, {"shared": 0}, {"kl": "much"}, {"kl": None}]
)
def test_numbers_that_no_measurement_gives_are_damage(
    store: SensitivityStore, fields: dict[str, object]
) -> None:
    """Even under a checksum that fits."""
    from graphwright.optimizer.quality.store import _digest

    data = json.loads(store.path.read_text())
    data["entries"]["a|p"].update(fields)
    data["sha256"] = _digest(data["entries"])
    store.path.write_text(json.dumps(data))
    assert store.read() == {}


def test_an_interrupted_write_leaves_the_old_file(
    store: SensitivityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it or nothing, and no rubbish; the lock is free again."""

    def interrupt(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.add({"c|p": Sensitivity(1.0, 1.0)})
    assert store.read() == ENTRIES
    assert not list(store.folder.glob("*.tmp"))
    store.add({"c|p": Sensitivity(1.0, 1.0)})
    assert "c|p" in store.read()


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    """Both add to one file; whoever reads meanwhile sees a whole file that only grows."""
    context = multiprocessing.get_context("fork")  # the other ways import torch again, twice
    writers = [context.Process(target=write, args=(tmp_path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    store, seen = SensitivityStore("key", tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        time.sleep(0.01)
        count = len(store.read())
        assert count >= seen
        seen = count
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(store.read()) == 40


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Nothing is kept, and the measurement goes on."""
    (tmp_path / "file").write_text("")
    store = SensitivityStore("key", tmp_path / "file" / "folder")
    store.add(ENTRIES)
    assert store.read() == {}


def test_old_files_go(tmp_path: Path) -> None:
    """The folder does not grow for ever."""
    for index in range(70):
        SensitivityStore(f"key{index}", tmp_path).add({"a|p": Sensitivity(1.0, 1.0)})
        os.utime(tmp_path / f"key{index}.json", (index, index))
    SensitivityStore("last", tmp_path).add(ENTRIES)
    assert len(list(tmp_path.glob("*.json"))) == 64
    assert SensitivityStore("last", tmp_path).read() == ENTRIES
    assert SensitivityStore("key0", tmp_path).read() == {}


def test_the_key_follows_weights_structure_text_and_step(lab: Lab) -> None:
    """And nothing else: not the names of nodes' annotations, nor which process asks."""
    key = store_key(lab.graph, "text", 16)
    same = lab.graph.copy()
    same.annotations["compile"] = True
    assert store_key(same, "text", 16) == key
    others = [store_key(lab.graph, "other", 16), store_key(lab.graph, "text", 8)]
    for change in (lambda t: t * 2, lambda t: t.double(), lambda t: t.to("meta")):
        other = lab.graph.copy()
        name = "model.layers.2.mlp.down_proj.weight"
        other.parameters[name] = change(other.parameters[name])
        others.append(store_key(other, "text", 16))
    without = lab.graph.copy()
    without.fx.erase_node(without.calls("cache_append")[0])
    others.append(store_key(without, "text", 16))
    assert len({key, *others}) == 1 + len(others)


def test_code_has_a_version_where_it_is_not_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's content, a notebook's functions, or nothing."""
    assert code_version(SensitivityStore) == ""
    assert code_version(Lab) == code_version(RoundCache) != ""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    versions = []
    for body in ("return 1", "return 2"):
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(f"class Cell:\n  def apply(self):\n    {body}", names)
        versions.append(code_version(names["Cell"]))
    assert versions[0] != versions[1]


def test_weights_are_sampled_wherever_they_lie(lab: Lab) -> None:
    """A view that is laid out otherwise, but holds the same numbers, is the same weight."""
    name = "model.layers.0.mlp.up_proj.weight"
    other = lab.graph.copy()
    other.parameters[name] = other.parameters[name].t().contiguous().t()
    assert not other.parameters[name].is_contiguous()
    assert store_key(other, "text", 16) == store_key(lab.graph, "text", 16)
    scalar = lab.graph.copy()
    scalar.parameters["extra"] = torch.tensor(2.0)
    assert store_key(scalar, "text", 16) != store_key(lab.graph, "text", 16)
