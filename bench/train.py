# SPDX-License-Identifier: Apache-2.0
"""Whole trainings on one GPU: ours with masks, and gsplat's default beside it: `python -m bench.train --help`.

Every training runs in a process of its own, one after the other, and is measured by its own log: seconds of training
without evaluation, PSNR of the test views as metrics.py computes it, Gaussians in the saved model, peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.log_reader import read_log
from launch.run import run_main
from scene.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str]) -> int:
    """Train, print one table and write JSON."""
    options = _parse(arguments)
    rows = []
    for row in _trainings(options):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)  # the next one may take long
        rows.append(row)
    masked = [row for row in rows if row["trainer"] == "mask-grendel"]
    for name in ("seconds", "psnr", "gaussians"):
        values = [float(row[name]) for row in masked]
        print(f"{name}: mean {statistics.fmean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _trainings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each training, as soon as it has ended."""
    for seed in options.seeds:
        yield ours(options, seed)
    if options.peer:
        yield peer(options)


def ours(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One training by train.py, read from its log."""
    folder = options.out / f"{options.data.name}-{options.iterations}-seed{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "-s", str(options.data), "-m", str(folder), "--eval", "--quiet"]
    command += ["--iterations", str(options.iterations), "--seed", str(seed), *options.flags]
    _run(command)
    log = read_log(folder / "metrics.jsonl")
    if log.end is None:
        raise InputError(f"{folder} holds a training that did not end; see its train.log.")
    tests = [record for record in log.evaluations if record["split"] == "test"]
    return {
        "trainer": "mask-grendel",
        "seed": seed,
        "seconds": round(log.end["seconds"], 2),
        "psnr": round(tests[-1]["psnr"], 3),
        "gaussians": tests[-1]["num_gaussians"],
        "gpu_peak_bytes": log.end.get("gpu_peak_bytes"),
    }


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """One training by gsplat, in a process of its own."""
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path;"
        "from bench.train_gsplat import train_with_gsplat as train;"
        "print(json.dumps(asdict(train(Path(sys.argv[1]), int(sys.argv[2]), 0))))"
    )
    output = _run([sys.executable, "-c", code, str(options.data), str(options.iterations)])
    result = json.loads(output.strip().splitlines()[-1])
    return {
        "trainer": "gsplat",
        "seed": 0,
        "seconds": round(result["seconds"], 2),
        "psnr": round(result["psnr"], 3),
        "gaussians": result["num_gaussians"],
        "gpu_peak_bytes": int(result["peak_gib"] * (1 << 30)),
    }


def _run(command: list[str]) -> str:
    """The output of a program. Raises: InputError with the end of what it said when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a COLMAP scene")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "bench", help="folder for the models")
    parser.add_argument("--iterations", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="gsplat's default as well")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to train.py")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
