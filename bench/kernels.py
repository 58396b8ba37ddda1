# SPDX-License-Identifier: Apache-2.0
"""masksplat's kernels against gsplat and torch on one GPU, in one process: `python -m bench.kernels --help`.

Both sides get the same Gaussians and the same view, the same number of warm-ups and repetitions, CUDA events around
every call, and medians. Masks: a second run of ours with all masks 1 tells what they cost at equal counts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernel_contenders import gsplat_stages, masksplat_stages
from bench.kernel_scenes import KernelScene, grid_scene, model_scene
from launch.bodies import overflow_watch
from launch.run import run_main
from masksplat.ops import get_body

TARGETS = {"forward": 1.8, "backward": 3.0, "projection": 2.0, "step": 2.5, "loss": 1.5, "optimizer path": 2.0}
"""How many times faster than gsplat (loss: than torch) each stage is meant to be."""

WARM_UPS, REPETITIONS, SLOW_REPETITIONS, CALLS = 5, 20, 3, 5
"""Calls are timed five at a time, queued back to back, so that the GPU does not wait for the host's first launch."""


def main(arguments: Sequence[str]) -> int:
    """Time every stage on every scene, print one table and write JSON."""
    options = _parse(arguments)
    device = torch.device(options.device)
    base = model_scene(options.model, options.view, device)
    results: dict[str, Any] = {"device": _device_name(device), "torch": torch.__version__, "scenes": {}}
    for count in [0, *options.counts]:
        scene = grid_scene(base, count) if count else base
        results["scenes"][scene.name] = compare(scene, options.gsplat, with_torch=options.torch and not count)
        _print_table(scene, results["scenes"][scene.name])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(scene: KernelScene, with_gsplat: bool, with_torch: bool) -> dict[str, dict[str, float]]:
    """For each stage the milliseconds of masksplat, masksplat with masks, gsplat, and the reference body in torch."""
    body = get_body("cuda" if scene.background.is_cuda else "cpu")
    ones = torch.ones_like(scene.gaussians.opacities)
    sides = {"masksplat": masksplat_stages(body, scene), "masks": masksplat_stages(body, scene, ones)}
    watch = overflow_watch(body)
    if watch is not None:
        watch.defers = True  # as in training; the stages above have made the buffers large enough
    if with_gsplat:
        from masksplat.gsplat.body import import_gsplat

        sides["gsplat"] = gsplat_stages(import_gsplat(), scene)
    if with_torch:
        sides["torch"] = masksplat_stages(get_body("reference"), scene)
    few = {"torch": SLOW_REPETITIONS}
    return {
        stage: {side: measure(stages[stage], few.get(side, REPETITIONS)) for side, stages in sides.items()}
        for stage in TARGETS
    }


def measure(call: Callable[[], Any], repetitions: int) -> float:
    """Median milliseconds of a call."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def _print_table(scene: KernelScene, stages: dict[str, dict[str, float]]) -> None:
    width, height = scene.size
    print(f"{scene.name}, {len(scene.gaussians):,} Gaussians, {width}x{height}")
    print(f"{'stage':16}{'ours ms':>9}{'masks ms':>10}{'gsplat ms':>11}{'times':>7}{'target':>8}{'torch ms':>10}")
    for stage, ms in stages.items():
        ours, masked, peer, slow = (ms.get(side, math.nan) for side in ("masksplat", "masks", "gsplat", "torch"))
        times = f"{peer / ours:7.2f}{TARGETS[stage]:8.1f}"
        print(f"{stage:16}{ours:9.3f}{masked:10.3f}{peer:11.3f}{times}{slow:10.2f}", flush=True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder that train.py has written")
    parser.add_argument("--view", type=int, default=0, help="camera of its cameras.json (default 0)")
    parser.add_argument("--counts", type=int, nargs="*", default=[], help="also grids of this many Gaussians")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gsplat", action=argparse.BooleanOptionalAction, default=True, help="the peer")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="plain torch on the model")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
