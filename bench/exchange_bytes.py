# SPDX-License-Identifier: Apache-2.0
"""What travels between ranks in a step, against mask-Grendel-GS: `python -m bench.exchange_bytes --help`.

The views of a scene are projected with the Gaussians of a model; ranks are simulated, nothing is sent. Every view is
drawn once before, for the costs that share out the pixels. All Gaussians count as sampled (a row that is not sampled
returns one number instead of nine, so a training with masks sends less).

mask-Grendel-GS's figure is the least it can be: whole views, 88 bytes for each Gaussian that its rule finds visible
(squares of 3 sigma), whoever owns it, because it sends itself its own share, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.measuring import ROOT, describe_machine
from bench.verdicts import Target, format_table, write_json
from distributed.balance import partition_batch
from distributed.communicator import Communicator
from distributed.exchange import GRENDEL_BACKWARD_BYTES, GRENDEL_FORWARD_BYTES
from distributed.partition import bounding_box, morton_codes, morton_owners
from distributed.simulation import batches, simulate_exchange
from gaussian_renderer.views import gaussians_of, views_of
from launch.run import run_main
from masksplat.ops import Body, get_body
from masksplat.types import SLOT_UNSEEN, ProjectionSettings, Splats
from scene.cameras import Camera
from scene.dataset import SceneOptions, load_scene
from scene.gaussians import GaussianTable
from scene.ply import load_ply
from scene.points import initial_gaussians

TARGETS = {2: 55.0, 4: 65.0}
"""Largest share of mask-Grendel-GS's bytes in %, by number of ranks."""

SETTINGS = ProjectionSettings(sh_degree=0)


@dataclass(frozen=True)
class BytesPerStep:
    """Means over steps with as many views as ranks. copies: of splats delivered; remote: those to other ranks."""

    num_ranks: int
    copies: float
    remote: float
    forward: float
    backward: float
    counts: float
    grendel: float

    @property
    def share(self) -> float:
        """Of mask-Grendel-GS's bytes."""
        return (self.forward + self.backward + self.counts) / self.grendel


def project(body: Body, table: GaussianTable, cameras: Sequence[Camera]) -> Splats:
    """All Gaussians of the table in the given views, numbered by row."""
    return body.project(gaussians_of(table.params), views_of(cameras, table.params["means"]), SETTINGS)


def costs_of(body: Body, table: GaussianTable, cameras: Sequence[Camera]) -> list[np.ndarray]:
    """(tile rows,) int64 pairs of each view, as training counts them, and its pixels."""
    costs = []
    for camera in cameras:
        size = (camera.width, camera.height)
        frame = body.rasterize(project(body, table, [camera]), 0, size, torch.zeros(3))
        costs.append(frame.pairs_per_row.numpy() + 16 * camera.width)
    return costs


def spatial_owners(means: Tensor, num_ranks: int) -> Tensor:
    """(N,) the rank of each Gaussian after a recut."""
    alone = Communicator()
    codes = morton_codes(means, *bounding_box(means, alone))
    return morton_owners(codes, torch.arange(len(means)), num_ranks, alone)


def measure(
    body: Body, table: GaussianTable, cameras: Sequence[Camera], costs: Sequence[np.ndarray], num_ranks: int
) -> BytesPerStep:
    """Means over one epoch of steps with `num_ranks` views each."""
    owners = spatial_owners(table.params["means"], num_ranks)
    found = []
    for batch in islice(batches(len(cameras), num_ranks, 0), max(1, len(cameras) // num_ranks)):
        mine = [cameras[view] for view in batch]
        splats = project(body, table, mine)
        owner = owners[splats.gaussians.long()]
        parts = [owner[slice(*splats.view_range(view))] for view in range(len(batch))]
        affinity = np.stack([torch.bincount(part, minlength=num_ranks).numpy() for part in parts])
        heights, loads = [camera.height for camera in mine], [costs[view] for view in batch]
        partition = partition_batch(heights, loads, num_ranks, affinity=affinity)
        sent = simulate_exchange(splats, owner, partition, id_bound=len(table))
        grendel = int((splats.slots != SLOT_UNSEEN).sum()) * (GRENDEL_FORWARD_BYTES + GRENDEL_BACKWARD_BYTES)
        remote = sent.copies - sent.own_copies
        found.append((sent.copies, remote, sent.forward_bytes, sent.backward_bytes, sent.count_bytes, grendel))
    return BytesPerStep(num_ranks, *np.mean(found, axis=0).tolist())


def _cells(result: BytesPerStep) -> tuple[str, ...]:
    sent = result.forward + result.backward + result.counts
    return (
        str(result.num_ranks), f"{result.copies:.0f}", f"{result.remote:.0f}", f"{sent:.0f}", f"{result.grendel:.0f}",
        f"{100 * result.share:.1f}",
    )  # fmt: skip


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.exchange_bytes", description=str(__doc__))
    parser.add_argument("-s", "--source", type=Path, required=True, help="folder of the scene")
    parser.add_argument(
        "--model", type=Path, help="ply file of the Gaussians; default: those that training begins with"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--views", type=int, help="use only so many training views")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "exchange_bytes.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print the table and the verdicts, write the JSON; returns 1 when a target is missed."""
    options = _parse(arguments)
    scene = load_scene(options.source, SceneOptions(eval=True), progress=False)
    arrays = load_ply(options.model) if options.model else initial_gaussians(scene.points, 3, progress=False)
    table, body = GaussianTable.from_arrays(arrays), get_body("cpu")
    cameras = scene.train[: options.views]
    costs = costs_of(body, table, cameras)
    print(f"{options.source.name}: {len(table)} Gaussians, {len(cameras)} views, as many views in a step as ranks")
    results = [measure(body, table, cameras, costs, num_ranks) for num_ranks in options.ranks]
    head = ("ranks", "splats delivered", "to other ranks", "bytes a step", "mask-Grendel-GS", "%")
    print(format_table(head, [_cells(result) for result in results]))
    targets = [
        Target(
            f"of mask-Grendel-GS's bytes, {result.num_ranks} ranks",
            TARGETS[result.num_ranks],
            100 * result.share,
            "%",
            False,
        )
        for result in results
        if result.num_ranks in TARGETS
    ]
    print("\n" + "\n".join(target.line() for target in targets))
    content = {"machine": describe_machine(), "source": options.source.name, "num_gaussians": len(table)}
    records = [{**asdict(result), "share": result.share} for result in results]
    write_json(options.json, {**content, "results": records, "targets": [target.record() for target in targets]})
    return 1 if any(target.verdict != "MET" for target in targets) else 0


if __name__ == "__main__":
    run_main(main)
