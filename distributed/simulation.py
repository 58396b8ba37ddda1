# SPDX-License-Identifier: Apache-2.0
"""What as many ranks as one likes would do, without starting any.

`python -m distributed.simulation COSTS.json` tells how evenly the rules share out batches whose costs are known. The
file holds, for each view, the list of the costs of its tile rows (pairs of pixel and splat). Nothing is drawn.

`simulate_exchange` counts what ranks would send each other for given splats; `bench/exchange_bytes.py` draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from distributed.balance import RULES, loads_of, partition_batch, smallest_largest_load
from distributed.exchange import COUNT_BYTES, Traffic
from distributed.pixels import PixelPartition
from distributed.routes import NUM_GROUPS, NUMBERS_BACK, select_rows
from distributed.wire import Wire
from masksplat.random import permutation
from masksplat.types import TILE, Splats


@dataclass(frozen=True)
class Imbalance:
    """Largest over mean load of a rule: mean and worst over the batches. best: of the best contiguous cut, mean.

    worst_over_best: the largest ratio of the rule's largest load to that of the best contiguous cut of the same batch.
    """

    rule: str
    num_ranks: int
    batch_size: int
    mean: float
    worst: float
    best: float
    worst_over_best: float


def simulate(
    costs: Sequence[np.ndarray], num_ranks: int, batch_size: int, *, rule: str, num_batches: int = 50, seed: int = 0
) -> Imbalance:
    """Share out batches of views drawn as in training: every view once, in an order that `seed` gives, then again.

    Args: costs: for each view, (tile rows,) int64 > 0.
    """
    found, bounds = [], []
    for batch in islice(batches(len(costs), batch_size, seed), num_batches):
        mine = [costs[view] for view in batch]
        partition = partition_batch([TILE * len(view) for view in mine], mine, num_ranks, rule=rule)
        rows = np.concatenate(mine)
        mean = float(rows.sum()) / num_ranks
        found.append(max(loads_of(partition, mine)) / mean)
        bounds.append(smallest_largest_load(rows.tolist(), num_ranks) / mean)
    over = max(value / bound for value, bound in zip(found, bounds, strict=True))
    mean, best = float(np.mean(found)), float(np.mean(bounds))
    return Imbalance(rule, num_ranks, batch_size, mean, max(found), best, over)


def batches(num_views: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of views without end, drawn as in training: every view once, in an order that `seed` gives, ..."""
    epoch = 0
    views: list[int] = []
    while True:
        while len(views) < batch_size:
            views += permutation(seed, epoch, num_views)
            epoch += 1
        yield views[:batch_size]
        views = views[batch_size:]


def table_of(costs: Sequence[np.ndarray], ranks: Sequence[int], batch_sizes: Sequence[int], num_batches: int) -> str:
    """One line for each number of ranks and batch size; the numbers are max/mean load, mean and (worst) batch."""
    lines = [f"{'ranks':>5} {'batch':>5} " + "".join(f"{rule:>18}" for rule in RULES) + f"{'best cut':>10}"]
    for num_ranks in ranks:
        for batch_size in batch_sizes:
            results = [simulate(costs, num_ranks, batch_size, rule=rule, num_batches=num_batches) for rule in RULES]
            cells = "".join(f"{f'{result.mean:.3f} ({result.worst:.3f})':>18}" for result in results)
            lines.append(f"{num_ranks:>5} {batch_size:>5} {cells}{results[0].best:>10.3f}")
    return "\n".join(lines)


def simulate_exchange(splats: Splats, owners: Tensor, partition: PixelPartition, *, id_bound: int) -> Traffic:
    """What all ranks together would deliver in one step, boxes not sent: the sum of their `ExchangePlan.traffic`.

    Args: splats: M packed rows of the views of all ranks' Gaussians; owners: (M,) int64 rank that owns each row.
    """
    selection, counts = select_rows(splats, partition), [len(mine) for mine in partition.regions]
    target, group = np.array(
        [(rank, group) for rank, count in enumerate(counts) for group in range(NUM_GROUPS) for _ in range(count)]
    ).T
    copies = selection.counts.numpy()
    is_remote = owners[selection.rows[: copies.sum()]].numpy() != np.repeat(target, copies)
    remote = np.bincount(np.repeat(group, copies)[is_remote], minlength=NUM_GROUPS)
    num_ranks, wire = partition.num_ranks, Wire.of(splats, id_bound, sends_boxes=False, in_words=False)
    return Traffic(
        copies=int(copies.sum()),
        own_copies=int(copies.sum() - remote.sum()),
        forward_bytes=int(remote.sum()) * wire.row_bytes,
        backward_bytes=int(remote @ np.array(NUMBERS_BACK)) * wire.dtype.itemsize,
        count_bytes=COUNT_BYTES * len(copies) * num_ranks * (num_ranks - 1),
    )


def read_costs(path: Path) -> list[np.ndarray]:
    """The vectors of a file. Raises: ValueError when it does not hold lists of positive whole numbers."""
    with path.open(encoding="utf-8") as file:
        views = json.load(file)
    if not isinstance(views, list) or not views or not all(_is_vector(view) for view in views):
        raise ValueError(f"{path} must hold a list of views, each a list of the positive whole costs of its tile rows")
    return [np.array(view, np.int64) for view in views]


def _is_vector(view: object) -> bool:
    return isinstance(view, list) and len(view) > 0 and all(type(cost) is int and 0 < cost < 1 << 53 for cost in view)


def main(arguments: Sequence[str]) -> int:
    """Print the table for a file of costs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m distributed.simulation", description=str(__doc__))
    parser.add_argument("costs", type=Path, help="JSON: a list of costs of tile rows for each view")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batches", type=int, default=50, help="how many batches to share out")
    options = parser.parse_args(arguments)
    try:
        costs = read_costs(options.costs)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table_of(costs, options.ranks, options.batch_sizes, options.batches))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
