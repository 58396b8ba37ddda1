# SPDX-License-Identifier: Apache-2.0
"""What one run of a suite ended with: gathered from its folder, and kept there in run.json. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.log_reader import read_log
from launch.origin import RUN_FILE, Origin
from launch.protocols import BenchmarkScene
from scene.errors import InputError
from scene.model_folder import ModelFolder, write_json_atomically

FRAME_RATE_FILE = "frame_rate.json"


@dataclass(frozen=True)
class Result:
    """The measures of a finished run.

    psnr (dB), ssim, lpips (None without its weights): means over the test views. num_bytes: of the saved ply. seconds:
    of training, without measuring and saving. peak_bytes: memory of the GPU, of the process where there is none.
    common_flags: what every run of its suite was given; None where an earlier version did not note it.
    """

    protocol: str
    scene: str
    method: str
    seed: int
    psnr: float
    ssim: float
    lpips: float | None
    num_gaussians: int
    num_bytes: int
    seconds: float
    peak_bytes: int
    frames_per_second: float
    device: str
    common_flags: str | None = None

    def __str__(self) -> str:
        """A few words for the terminal."""
        return f"{self.psnr:.2f} dB, {self.num_gaussians:,} Gaussians, {self.seconds:.0f} s"


def read_result(folder: Path) -> Result | None:
    """What is kept in the folder of a run; None when it is not finished.

    Raises: InputError when the file is damaged.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        return Result(**_json(path)["result"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is of another version ({error}); remove that run's folder") from error


def run_folder(suite: Path, scene: str, method: str, seed: int) -> Path:
    """Where a run of a suite is."""
    return suite / scene / f"{method}-{seed}"


def finished_runs(suite: Path) -> dict[Path, Result]:
    """All finished runs in the folder of a suite, by their folders; copies of them under other names are passed over.

    Raises: InputError when one is damaged.
    """
    kept = {path.parent: read_result(path.parent) for path in sorted(suite.glob(f"*/*/{RUN_FILE}"))}
    return {
        folder: result
        for folder, result in kept.items()
        if result is not None and folder == run_folder(suite, result.scene, result.method, result.seed)
    }


def is_trained(folder: Path) -> bool:
    """Whether the training in a folder has gone to its end, and left a model."""
    model = ModelFolder(folder)
    try:
        return read_log(model.metrics).end is not None and bool(model.saved_iterations())
    except InputError:
        return False


def is_measured(folder: Path) -> bool:
    """Whether the test views of a trained model have been measured, too."""
    model = ModelFolder(folder)
    try:
        return is_trained(folder) and f"ours_{model.find_iteration()}" in _json(model.results("test"))
    except InputError:
        return False


def result_of(
    folder: Path, scene: BenchmarkScene, method: str, seed: int, *, origin: Origin, common_flags: Sequence[str]
) -> Result:
    """Gather what a run has left in its folder, and keep it in run.json: the run is finished.

    Raises: InputError when a part is missing.
    """
    model = ModelFolder.open(folder)
    iteration, log = model.find_iteration(), read_log(model.metrics)
    measures = _json(model.results("test")).get(f"ours_{iteration}", {})
    frames = _json(folder / FRAME_RATE_FILE)
    saved = [record for record in log.saved if record["iteration"] == iteration]
    if log.end is None or not saved or "PSNR" not in measures:
        raise InputError(f"{folder} has no measures of iteration {iteration}; are there test views?")
    result = Result(
        protocol=scene.protocol,
        scene=scene.name,
        method=method,
        seed=seed,
        psnr=measures["PSNR"],
        ssim=measures["SSIM"],
        lpips=measures.get("LPIPS"),
        num_gaussians=saved[-1]["num_gaussians"],
        num_bytes=model.point_cloud(iteration).stat().st_size,
        seconds=log.end["seconds"],
        peak_bytes=log.end.get("gpu_peak_bytes") or log.end["peak_memory_bytes"],
        frames_per_second=frames["frames_per_second"],
        device=frames["device"],
        common_flags=shlex.join(common_flags),
    )
    write_json_atomically(folder / RUN_FILE, {**origin.plain(), "result": asdict(result)})
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove the run's folder to have it made again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged; remove the run's folder to have it made again")
    return content
