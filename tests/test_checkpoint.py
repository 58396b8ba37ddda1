# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: what is written is read by any number of ranks, and nothing damaged is ever taken for whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import scene.checkpoint
from distributed.communicator import Communicator
from scene.checkpoint import Checkpoint, load_checkpoint, load_newest, save_checkpoint
from scene.checkpoint_manifest import MANIFEST, RunState, canonical_bytes, read_manifest
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for


class ThreadRanks:
    """One rank of a world of threads: sums meet at a barrier."""

    def __init__(self, rank: int, size: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._slots, self._barrier = rank, size, slots, barrier

    def sum(self, values: Tensor) -> Tensor:
        self._slots[self.rank] = values
        self._barrier.wait(20)
        total = torch.stack(self._slots).sum(dim=0)
        self._barrier.wait(20)
        return total


def on_ranks(size: int, action: Callable[[ThreadRanks], object]) -> list[object]:
    """What the action returns or raises on each rank."""
    slots, barrier, results = [torch.zeros(0)] * size, threading.Barrier(size), [None] * size

    def body(rank: int) -> None:
        try:
            results[rank] = action(ThreadRanks(rank, size, slots, barrier))
        except InputError as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def some_table(num_rows: int, *, sh_degree: int = 1, first_id: int = 0, seed: int = 0) -> GaussianTable:
    """A table in which no number is zero."""
    generator = torch.Generator().manual_seed(seed + first_id)
    arrays = {spec.name: torch.randn(num_rows, *spec.shape, generator=generator) for spec in attributes_for(sh_degree)}
    table = GaussianTable.from_arrays(arrays, ids=torch.arange(first_id, first_id + num_rows) * 7 + (1 << 62))
    for group in (table.exp_avg, table.exp_avg_sq, table.statistics):
        for name in group:
            group[name] = torch.rand(group[name].shape, generator=generator)
    table.num_updates = 41
    return table


def state(iteration: int = 42, **more: object) -> RunState:
    return RunState(iteration, iteration, 1, 5, 2.5, **more)  # type: ignore[arg-type]


def saved(place: Path, number: int = 42, num_rows: int = 9) -> Path:
    return save_checkpoint(place, number, some_table(num_rows), state(number), Communicator())


def rows_by_id(*tables: GaussianTable) -> dict[int, bytes]:
    """Every bit of every row by its id."""
    rows: dict[int, bytes] = {}
    for table in tables:
        groups = (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
        tensors = [group[name] for group in groups for name in sorted(group)]
        for row, each in enumerate(table.ids.tolist()):
            assert each not in rows
            rows[each] = b"".join(tensor[row].numpy().tobytes() for tensor in tensors)
    return rows


def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.mark.parametrize("sh_degree", [0, 1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 8])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, sh_degree: int, num_rows: int) -> None:
    table = some_table(num_rows, sh_degree=sh_degree)
    before = state(42, config={"a": {"b": [1, 0.1, "c", None]}}, data={"points": "ab"}, clocks={"seconds": 0.25})
    folder = save_checkpoint(tmp_path, 40, table, before, Communicator())
    found = load_checkpoint(folder)
    assert folder == tmp_path / "40"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["40"]
    assert found.state == before
    assert (found.table.num_updates, found.table.sh_degree) == (41, sh_degree)
    assert torch.equal(found.table.ids, table.ids)
    assert rows_by_id(found.table) == rows_by_id(table)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["num_gaussians"] == num_rows
    assert manifest["shards"][0]["num_rows"] == num_rows


def test_equal_tables_give_equal_files(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    """Every row once and only once, with moments and statistics; one of the writers may own nothing."""
    counts = [5, 0, 3, 7][:writers]
    tables = [some_table(count, first_id=100 * rank) for rank, count in enumerate(counts)]
    results = on_ranks(writers, lambda ranks: save_checkpoint(tmp_path, 42, tables[ranks.rank], state(), ranks))
    assert results == [tmp_path / "42"] * writers
    assert len(list((tmp_path / "42").iterdir())) == writers + 1

    def mine(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda means, ids: torch.nonzero(ids % readers == rank).flatten()

    parts = [load_checkpoint(tmp_path / "42", choose=mine(rank)).table for rank in range(readers)]
    assert rows_by_id(*parts) == rows_by_id(*tables)
    whole = load_checkpoint(tmp_path / "42").table
    assert torch.equal(whole.ids, torch.cat([table.ids for table in tables]))
    for rank, table in enumerate(tables):
        own = load_checkpoint(tmp_path / "42", shards=[rank]).table
        assert torch.equal(own.ids, table.ids)
        assert rows_by_id(own) == rows_by_id(table)


def test_a_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 42)
    before = {path.name: path.read_bytes() for path in (tmp_path / "42").iterdir()}
    write = scene.checkpoint.save_file

    def fail(tensors: dict[str, Tensor], path: str, **more: object) -> None:
        if "shard-00001" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(scene.checkpoint, "save_file", fail)
    tables = [some_table(3, first_id=100 * rank) for rank in range(3)]
    results = on_ranks(3, lambda ranks: save_checkpoint(tmp_path, 42, tables[ranks.rank], state(), ranks))
    assert all(isinstance(result, InputError) for result in results)
    assert "No space left" in str(results[1])
    assert "rank 1 could not write" in str(results[0])
    assert [path.name for path in tmp_path.iterdir()] == ["42"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "42").iterdir()} == before


@pytest.mark.parametrize("operation", ["fsync", "rename", "mkdir", "open", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    saved(tmp_path, 10)
    before = {path.name: path.read_bytes() for path in (tmp_path / "10").iterdir()}

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if operation == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, operation, fail)
        with pytest.raises(InputError, match=r"20.partial cannot be written.*older checkpoints.* are untouched"):
            saved(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "10").iterdir()} == before


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs 1,\d{3},\d{3} bytes and its disk has 1,000 left"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 42, num_rows=9)
    saved(tmp_path, 42, num_rows=4)
    assert len(loaded(tmp_path / "42").table) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["42"]


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 42).rename(tmp_path / ".42.replaced")
    (tmp_path / ".42.partial").mkdir()
    search = load_newest(tmp_path)
    assert search.checkpoint is not None
    assert search.checkpoint.path.name == ".42.replaced"


class Crash(BaseException):
    """The end of the process, which nothing in the program catches."""


@pytest.mark.parametrize("number", [10, 20], ids=["the same name", "a new name"])
def test_a_crash_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """R12: the process ends at each call that touches the disk, in turn; before or after it is found, never between."""
    found = []
    for moment in range(40):
        place = tmp_path / str(moment)
        saved(place, 10, num_rows=9)
        with monkeypatch.context() as patch:
            calls = crash_at(patch, moment)
            try:
                saved(place, number, num_rows=4)
                is_finished = True
            except Crash:
                is_finished = False
        search = load_newest(place)
        assert search.checkpoint is not None
        found.append(len(search.checkpoint.table))
        if any(path.name.endswith(".partial") for path in place.iterdir()):
            assert number == 10 or any("being written" in sentence for sentence in search.skipped)
        if is_finished:
            break
    assert is_finished
    assert calls[0] == moment
    assert moment >= 9
    assert found == sorted(found, reverse=True)
    assert set(found) == {9, 4}
    saved(place, number, num_rows=5)  # leftovers are no obstacle
    assert len(loaded(place / str(number)).table) == 5


def crash_at(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """From call number `moment` on, no call that touches the disk does anything but crash; the calls so far."""
    calls = [0]

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            if calls[0] >= moment:
                raise Crash
            calls[0] += 1
            return function(*arguments, **more)

        return call

    remove = shutil.rmtree

    def remove_unless_crashed(*arguments: object, **more: object) -> None:
        if calls[0] < moment:
            remove(*arguments, **more)  # type: ignore[arg-type]

    patch.setattr(shutil, "rmtree", remove_unless_crashed)
    patch.setattr(os, "fsync", watched(os.fsync))
    patch.setattr(scene.checkpoint, "save_file", watched(scene.checkpoint.save_file))
    for name in ("mkdir", "chmod", "open", "rename"):
        patch.setattr(Path, name, watched(getattr(Path, name)))
    return calls


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """R13: 1,000 flips in shard and manifest, all noticed, the file named each time."""
    folder = saved(tmp_path)
    generator = random.Random(0)
    for name, num_flips in ((MANIFEST, 500), ("shard-00000-of-00001.safetensors", 500)):
        path = folder / name
        whole = path.read_bytes()
        for _ in range(num_flips):
            place = generator.randrange(8 * len(whole))
            data = bytearray(whole)
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            with pytest.raises(InputError) as caught:
                load_checkpoint(folder)
            assert name in str(caught.value)
        path.write_bytes(whole)
    loaded(folder)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 100)):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=path.name):
                load_checkpoint(folder)
        path.write_bytes(whole + b" ")
        with pytest.raises(InputError, match=path.name):
            load_checkpoint(folder)
        path.write_bytes(whole)


def test_the_damaged_record_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "shard-00000-of-00001.safetensors"
    tensors = load_file(path)
    tensors["exp_avg.quats"][2, 1] += 1e-6
    save_file(tensors, path, metadata={"iteration": "42"})
    with pytest.raises(InputError, match="1 of 24 records differ: exp_avg.quats"):
        load_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tables = [some_table(3, first_id=100 * rank) for rank in range(2)]
    on_ranks(2, lambda ranks: save_checkpoint(tmp_path, 42, tables[ranks.rank], state(), ranks))
    (tmp_path / "42" / "shard-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001-of-00002.*cannot be read: No such file"):
        load_checkpoint(tmp_path / "42")


def test_shards_and_manifests_of_another_run_or_rank_are_noticed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        tables = [some_table(3, first_id=100 * rank, seed=seed) for rank in range(2)]
        on_ranks(2, lambda ranks, t=tables, n=name: save_checkpoint(tmp_path / n, 42, t[ranks.rank], state(), ranks))  # type: ignore[misc]
    for victim, source in (
        ("shard-00000-of-00002.safetensors", "a/42/shard-00001-of-00002.safetensors"),
        ("shard-00001-of-00002.safetensors", "b/42/shard-00001-of-00002.safetensors"),
        (MANIFEST, "b/42/manifest.json"),
    ):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "a" / "42", tmp_path / "c")
        shutil.copy(tmp_path / source, tmp_path / "c" / victim)
        with pytest.raises(InputError, match="belongs to another checkpoint"):
            load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "has version 2, this program reads 1"),
        ("schema", "other", "is not the manifest of a checkpoint"),
        ("num_gaussians", 10, "describes other Gaussians"),
        ("sh_degree", 7, "lacks something"),
        ("sh_degree", 2, "describes other Gaussians"),
        ("attributes", [], "describes other Gaussians"),
        ("state", {}, "lacks something"),
        ("shards", [], "describes other Gaussians"),
        ("shards", [{"path": "../../etc/passwd"}], "lacks something"),
        ("shards", 3, "lacks something"),
    ],
)
def test_manifests_of_other_forms_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    """Also with a right checksum: a newer program, or somebody's hand."""
    folder = saved(tmp_path)
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"]
    (folder / MANIFEST).write_bytes(canonical_bytes({**content, key: value}))
    with pytest.raises(InputError, match=message):
        load_checkpoint(folder)


def test_a_gaussian_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    tables = [some_table(3), some_table(3)]
    on_ranks(2, lambda ranks: save_checkpoint(tmp_path, 42, tables[ranks.rank], state(), ranks))
    with pytest.raises(InputError, match="twice"):
        load_checkpoint(tmp_path / "42")


def test_the_newest_complete_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nothing").checkpoint is None
    for number in (900, 1000, 20):
        saved(tmp_path, number)
    (tmp_path / ".2000.partial").mkdir()
    (tmp_path / "3000").mkdir()
    (tmp_path / "notes").mkdir()
    next((tmp_path / "1000").glob("*.safetensors")).unlink()
    search = load_newest(tmp_path)
    assert search.checkpoint is not None
    assert search.checkpoint.path == tmp_path / "900"
    assert [sentence.split(" was passed over")[0] for sentence in search.skipped] == [
        str(tmp_path / name) for name in ("3000", ".2000.partial", "1000")
    ]


def test_numbers_of_other_kinds_survive(tmp_path: Path) -> None:
    table = some_table(4)
    for group in (table.params, table.exp_avg, table.exp_avg_sq, table.statistics):
        for name in group:
            group[name] = group[name].double() + 1e-12
    folder = save_checkpoint(tmp_path, 1, table, state(), Communicator())
    assert rows_by_id(loaded(folder).table) == rows_by_id(table)
    assert loaded(folder).table.params["means"].dtype == torch.float64


def test_a_manifest_can_be_read_alone(tmp_path: Path) -> None:
    manifest = read_manifest(saved(tmp_path))
    assert (manifest.world_size, manifest.num_gaussians, manifest.state.iteration) == (1, 9, 42)


def test_numbers_that_are_none_are_refused_when_a_state_is_made() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        RunState(-1, 0, 1, 0, 1.0)
