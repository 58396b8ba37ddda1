# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distributed.communicator import Communicator, DisagreementError, PeerError, Place
from launch.run import run_main
from rank_harness import RankFailure, run_ranks
from scene.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SIZES = [1, 2, 3, 4]


def talk(world: Communicator) -> dict[str, object]:
    """Every collective once, on numbers that tell ranks apart."""
    rank, size = world.rank, world.size
    sent = [(rank + 2 * to) % 3 for to in range(size)]
    expected = [(of + 2 * rank) % 3 for of in range(size)]
    rows = torch.tensor([[100 * rank + to, k] for to in range(size) for k in range(sent[to])], dtype=torch.int64)
    received = world.all_to_all_rows(rows.reshape(-1, 2), sent, expected)
    nothing = world.all_to_all_rows(torch.empty((0, 4)), [0] * size, [0] * size)
    widthless = world.all_to_all_rows(torch.empty((sum(sent), 0, 3)), sent, expected)
    world.barrier()
    nan = torch.tensor([float(rank), math.nan if rank == size // 2 else 0.0])
    return {
        "sum": world.sum(torch.tensor([0.1 * (rank + 1), 1e17 * (-1) ** rank], dtype=torch.float64)).tolist(),
        "max": world.max(torch.tensor([rank, -rank])).tolist(),
        "nan": world.max(nan).tolist(),
        "counts": world.gather_counts([rank, 10 * rank]),
        "received": received.tolist(),
        "expected": [[100 * of + rank, k] for of in range(size) for k in range(expected[of])],
        "empty": tuple(nothing.shape),
        "widthless": tuple(widthless.shape) == (sum(expected), 0, 3),
        "bytes": world.broadcast_bytes(bytes([7, 0, rank]), size - 1),
        "no bytes": world.broadcast_bytes(b"" if rank == 0 else b"ignored"),
    }


@pytest.mark.parametrize("size", SIZES)
def test_every_collective(size: int) -> None:
    answers = run_ranks(talk, size)
    total = [0.0, 0.0]
    for rank in range(size):
        total = [total[0] + 0.1 * (rank + 1), total[1] + 1e17 * (-1) ** rank]
    for answer in answers:
        assert answer["sum"] == total  # in rank order, to the last bit
        assert answer["max"] == [size - 1, 0]
        assert answer["nan"][0] == size - 1 and math.isnan(answer["nan"][1])
        assert answer["counts"] == [[rank, 10 * rank] for rank in range(size)]
        assert answer["received"] == answer["expected"]
        assert answer["empty"] == (0, 4) and answer["widthless"]
        assert answer["bytes"] == bytes([7, 0, size - 1]) and answer["no bytes"] == b""


def test_a_group_of_one_and_no_group_answer_alike() -> None:
    """Law 3."""
    grouped, alone = run_ranks(talk, 1)[0], talk(Communicator())
    assert math.isnan(grouped.pop("nan")[1]) and math.isnan(alone.pop("nan")[1])  # type: ignore[index]
    assert grouped == alone


def fail_on(world: Communicator, bad_ranks: list[int]) -> str:
    try:
        with world.all_or_none(ValueError):
            if world.rank in bad_ranks:
                raise ValueError(f"no photo at {world.rank}")
    except ValueError as error:
        return f"prints {error}"
    except PeerError as error:
        return f"ends because of rank {error.rank}: {error.message}"
    return "goes on"


def test_an_error_on_one_rank_ends_all_with_one_message() -> None:
    silent = "ends because of rank 1: no photo at 1"
    assert run_ranks(fail_on, 4, [1]) == [silent, "prints no photo at 1", silent, silent]
    assert run_ranks(fail_on, 3, [1, 2]) == [silent, "prints no photo at 1", silent]
    assert run_ranks(fail_on, 3, []) == ["goes on"] * 3
    assert fail_on(Communicator(), [0]) == "prints no photo at 0"


def fail_in_a_script(world: Communicator) -> tuple[object, str]:
    def main(_: object) -> None:
        with world.all_or_none(InputError):
            if world.rank != 0:
                raise InputError(f"no photo at {world.rank}")

    words = io.StringIO()
    with contextlib.redirect_stderr(words), pytest.raises(SystemExit) as end:
        run_main(main, [])
    return end.value.code, words.getvalue()


def test_scripts_print_the_error_of_a_rank_once() -> None:
    assert run_ranks(fail_in_a_script, 3) == [(2, ""), (2, "error: no photo at 1\n"), (2, "")]


def agree(world: Communicator, odd_rank: int) -> str:
    try:
        world.require_agreement("partition of step 7", 12345 + (world.rank >= odd_rank))
    except DisagreementError as error:
        return str(error)
    return "agree"


def test_the_first_rank_that_differs_is_named() -> None:
    assert run_ranks(agree, 3, 9) == ["agree"] * 3
    for message in run_ranks(agree, 4, 2):
        assert "partition of step 7: rank 2 has" in message and "2 of 4 ranks differ" in message


def die(world: Communicator) -> None:
    world.barrier()  # everybody has joined: who dies while others still connect leaves them to gloo's own time limit
    if world.rank == 1:
        os._exit(3)
    world.barrier()


def test_a_dead_rank_ends_the_others_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 died with exit code 3") as failure:
        run_ranks(die, 3)
    assert "rank 0:" in str(failure.value) and "rank 2:" in str(failure.value)
    assert time.monotonic() - start < 10


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 rows cannot be sent as \[2\]"):
        Communicator().all_to_all_rows(torch.zeros(3, 2), [2], [2])
    with pytest.raises(ValueError, match="sends itself 3 rows but expects 2"):
        Communicator().all_to_all_rows(torch.zeros(3, 2), [3], [2])


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; it must be a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2; ranks go from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": ""}, "WORLD_SIZE is 2 but RANK is not set; start the processes with torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_wrong_variables_are_explained(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Communicator.from_environment({**TORCHRUN, **changes})
    assert message in str(error.value)


def test_places() -> None:
    assert Place.from_variables({}) == Place(0, 1)
    assert Place.from_variables(TORCHRUN) == Place(1, 2, 1, "127.0.0.1", 29500)
    alone = Communicator.from_environment({"WORLD_SIZE": "1", "RANK": "0"})
    assert (alone.rank, alone.size, alone.has_group, alone.is_main) == (0, 1, False, True)


def test_a_missing_rank_is_named_within_the_time_out() -> None:
    with pytest.raises(RuntimeError, match=r"\[rank 1/2\] no contact with 127.0.0.1:"):
        Communicator.from_environment({**TORCHRUN, "MASTER_PORT": str(_free_port())}, join_seconds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK is 0 but this machine has 0 usable GPUs"):
        Communicator.from_environment({}, device_type="cuda")


SCRIPT = """
import torch
from distributed.communicator import Communicator
world = Communicator.from_environment(join_seconds=60, step_seconds=20)
print(world.label, world.sum(torch.tensor([world.rank + 1])).tolist(), flush=True)
world.close()
"""


def test_ranks_meet_through_the_environment() -> None:
    """What torchrun does, without its agent: two processes with the variables set."""
    shared = {**os.environ, **TORCHRUN, "MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=90)[0].strip() for process in processes]
    assert outputs == ["[rank 0/2] [3]", "[rank 1/2] [3]"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
