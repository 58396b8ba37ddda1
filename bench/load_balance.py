# SPDX-License-Identifier: Apache-2.0
"""How evenly the rules share out the pixels of a scene: `python -m bench.load_balance -s DATA --model PLY`.

Every training view is drawn once and its pairs of pixel and splat are counted by row of tiles, as training counts them;
then batches drawn as in training are shared out over simulated ranks by our rule, by equal rows and by Grendel's rule
(`distributed.simulation`). The numbers are the largest load over the mean, mean and (worst) of 50 batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.exchange_bytes import costs_of
from distributed.simulation import table_of
from launch.run import run_main
from masksplat.ops import get_body
from scene.dataset import SceneOptions, load_scene
from scene.gaussians import GaussianTable
from scene.ply import load_ply


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    options = _parse(arguments)
    scene = load_scene(options.source, SceneOptions(eval=True), progress=False)
    table = GaussianTable.from_arrays(load_ply(options.model))
    costs = costs_of(get_body("cpu"), table, scene.train)
    print(f"{options.source.name}: {len(table)} Gaussians, {len(costs)} views of {len(costs[0])} rows of tiles")
    print(table_of(costs, options.ranks, options.batch_sizes, num_batches=50))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.load_balance", description=str(__doc__))
    parser.add_argument("-s", "--source", type=Path, required=True, help="folder of the scene")
    parser.add_argument("--model", type=Path, required=True, help="ply file of the Gaussians")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
