# SPDX-License-Identifier: Apache-2.0
"""Two "nodes" with 1 and 3 processes train together: network namespaces of this machine, joined by a cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import train
from rank_trajectories import write_scene

ROOT = Path(__file__).resolve().parent.parent
INTERFACE = "cable"
PORT = 29517
FLAGS = (
    *("--eval", "--iterations", "24", "--bsz", "2", "--log_interval", "2", "--densify_from_iter", "4", "--no-report"),
    *("--densification_interval", "8", "--densify_grad_threshold", "1e-5", "--threads", "1", "--check_agreement"),
)


@dataclass(frozen=True)
class Node:
    """A network namespace and its address."""

    name: str
    address: str

    def start(self, processes: int, leader: Node, *arguments: str) -> subprocess.Popen[str]:
        """torchrun's agent of this node, which meets the others at the leader's address."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--nproc-per-node={processes}", "--rdzv-backend=c10d", f"--local-addr={self.address}"]
        # torchrun recognises the leader by its host name, which is the same in every namespace.
        is_host = str(self == leader).lower()
        command += [f"--rdzv-endpoint={leader.address}:{PORT}", f"--rdzv-conf=is_host={is_host},join_timeout=60"]
        command += ["--rdzv-id=two-nodes", *arguments]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two namespaces that reach each other and nothing else; skips with the reason where they cannot be made."""
    found = [Node(f"mask-grendel-{os.getpid()}-{number}", f"10.213.7.{number}") for number in (1, 2)]
    ends = [f"mg{os.getpid()}{letter}" for letter in "ab"]
    try:
        try:
            for node in found:
                ip("netns", "add", node.name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for node, end in zip(found, ends, strict=True):
                ip("link", "set", end, "netns", node.name)
                ip("-n", node.name, "link", "set", end, "name", INTERFACE)
                ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", INTERFACE)
                for link in ("lo", INTERFACE):
                    ip("-n", node.name, "link", "set", link, "up")
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            pytest.skip(f"no two network namespaces can be made here (root and iproute2 are needed): {reason}")
        yield found
    finally:
        for node in found:
            subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True, timeout=20)


def losses(model: Path) -> list[float]:
    records = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_nodes_with_1_and_3_processes_train_as_one_process_does(nodes: list[Node], tmp_path: Path) -> None:
    scene, together, alone = write_scene(tmp_path / "data"), tmp_path / "together", tmp_path / "alone"
    arguments = ("train.py", "-s", str(scene), "-m", str(together), *FLAGS)
    agents = [node.start(processes, nodes[0], *arguments) for node, processes in zip(nodes, (1, 3), strict=True)]
    try:
        outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert sum(output.count("Gaussians to start with on 4 processes") for output in outputs) == 1
    assert sorted(path.name for path in (together / "ranks").iterdir()) == [f"train-{rank}.log" for rank in (1, 2, 3)]
    assert train.main(["-s", str(scene), "-m", str(alone), *FLAGS, "--quiet"]) == 0
    assert len(losses(alone)) == 12
    # The first Gaussians are balls: their rotations have gradients of rounding errors, of which Adam makes full steps.
    # The law, for any shape, is in test_rank_training.py; here the first steps show that it is the same run.
    assert losses(together)[:3] == pytest.approx(losses(alone)[:3], rel=1e-5)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
