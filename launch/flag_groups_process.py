# SPDX-License-Identifier: Apache-2.0
"""The flags of what happens around a training: checkpoints, several processes, timers, debugging, viewers.

Nearly all of them come from a predecessor and either wait for their feature (refused by name when they would change the
result) or have no effect in this program (accepted, said once). `launch/flag_groups.py` has the others.
"""

from __future__ import annotations

import dataclasses

from launch.flag import flag

ALL_ROWS = "every Gaussian of a checkpoint is loaded once; leave the flag out"
ALWAYS_SPREAD = "they are always spread over the processes that there are"
NO_SOCKET = "there is no viewer socket in the training loop; open the saved ply in any 3DGS viewer"


@dataclasses.dataclass(frozen=True)
class CheckpointFlags:
    """Checkpoints: interrupting and resuming a training."""

    checkpoint_iterations: tuple[int, ...] = flag((), source="3DGS", unit="images")
    """Iterations after which a checkpoint is written to MODEL/checkpoints."""
    start_checkpoint: str = flag("", source="3DGS")
    """Checkpoint to go on from: a folder of ours or of Grendel-GS, one that holds several (the newest is taken), or a
    .pth of 3DGS, MaskGaussian or LP-3DGS."""
    auto_start_checkpoint: bool = flag(False, source="Grendel")
    """Goes on from the newest complete checkpoint of the model folder, if there is one; logs are appended."""
    drop_duplicate_gaussians_coeff: float = flag(1.0, source="Grendel", refused=ALL_ROWS)
    """Keeps a prefix of (< 1) or duplicates (> 1) the Gaussians of a loaded checkpoint, for scaling experiments."""


@dataclasses.dataclass(frozen=True)
class DistributionConfig:
    """Several processes: how Gaussians, pixels and images are spread."""

    image_distribution: bool = flag(True, source="Grendel", inert=ALWAYS_SPREAD)
    """Spreads the pixels over processes."""
    image_distribution_mode: str = flag(
        "final", source="Grendel", refused="only the mode 'final' was ever connected to Grendel-GS's training, too"
    )
    """Grendel-GS's numbered experiments with pixel partitions."""
    heuristic_decay: float = flag(
        0.0, source="Grendel", inert="costs are counted, not timed: the newest count is right"
    )
    """Weight of the old load estimate."""
    no_heuristics_update: bool = flag(False, source="Grendel")
    """Shares pixels out by their number alone, not by what they cost before."""
    border_divpos_coeff: float = flag(
        1.0, source="Grendel", inert="a cut moves to the border of an image when that unbalances by one percent at most"
    )
    """Tile rows within which a cut snaps to an image border."""
    adjust_strategy_warmp_iterations: int = flag(
        -1, source="Grendel", unit="images", inert="what a view costs is known from the step after next on"
    )
    """Images before the partition adapts (the spelling is Grendel-GS's)."""
    save_strategy_history: bool = flag(False, source="Grendel")
    """Writes strategy_history.jsonl: for each step who drew what, on which estimate, and what it cost."""
    gaussians_distribution: bool = flag(True, source="Grendel", inert=ALWAYS_SPREAD)
    """Spreads the Gaussians over processes."""
    redistribute_gaussians_mode: str = flag(
        "morton", source="Grendel", choices=("morton", "random_redistribute", "round_robin", "no_redistribute")
    )
    """How Gaussians are spread over processes, again when they are uneven. morton: neighbours in space together;
    random_redistribute: at random; round_robin: by their number; no_redistribute: as at the start."""
    redistribute_gaussians_frequency: int = flag(1, source="Grendel", minimum=1)
    """Events of densification and pruning between two looks at the balance."""
    redistribute_gaussians_threshold: float = flag(1.1, source="Grendel", minimum=1.0)
    """Ratio of the largest to the smallest count that is tolerated."""
    sync_grad_mode: str = flag("dense", source="Grendel", inert="it belongs to dead code of Grendel-GS")
    """Gradient exchange of replicated Gaussians."""
    grad_normalization_mode: str = flag("none", source="Grendel", inert="it belongs to dead code of Grendel-GS")
    """Gradient weights of replicated Gaussians."""
    distributed_dataset_storage: bool = flag(True, source="Grendel")
    """Keeps decoded images once per machine, in memory that its processes share; otherwise each process keeps its
    own."""
    distributed_save: bool = flag(
        True, source="Grendel", inert="the model is always saved as one merged ply, which every viewer opens"
    )
    """One ply per process."""
    local_sampling: bool = flag(False, source="Grendel")
    """Every process draws bsz/W whole images of its own, those whose number leaves its rank modulo W."""
    preload_dataset_to_gpu: bool = flag(False, source="Grendel")
    """Keeps all images in GPU memory, whatever their size; without a GPU they stay in host memory."""
    preload_dataset_to_gpu_threshold: float = flag(10.0, source="Grendel", unit="GB", minimum=0.0)
    """Size of the data set up to which all images are kept in GPU memory anyway."""
    multiprocesses_image_loading: bool = flag(
        True, source="Grendel", inert="images are decoded by --threads background threads"
    )
    """Two processes that decode images."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time and memory measurements of Grendel-GS."""

    enable_timer: bool = flag(False, source="Grendel")
    """Times phases by the GPU's clock, without waiting for it, not by the host's. Writes those of every process to
    MODEL/ranks; the first one's are always in metrics.jsonl."""
    end2end_time: bool = flag(True, source="Grendel", inert="total time and images/s are always measured")
    """Total time."""
    zhx_time: bool = flag(False, source="Grendel", inert="--enable_timer times the phases on the GPU")
    """Times of the CUDA kernels."""
    check_gpu_memory: bool = flag(False, source="Grendel")
    """Writes the GPU memory of every process to metrics.jsonl and MODEL/ranks."""
    check_cpu_memory: bool = flag(False, source="Grendel")
    """Writes the host memory of every process to metrics.jsonl and MODEL/ranks; the first one's is always there."""
    log_memory_summary: bool = flag(
        False, source="Grendel", inert="--check_gpu_memory logs the memory of every process"
    )
    """Logs the CUDA allocator's summary."""


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Debugging."""

    stop_update_param: bool = flag(False, source="Grendel")
    """Computes every step and changes nothing: no Adam update."""
    check_agreement: bool = flag(False)
    """Compares a hash of step, views and partition over all processes in every step and names the first that
    differs."""
    drop_initial_3dgs_p: float = flag(0.0, source="Grendel", minimum=0.0, maximum=1.0)
    """Probability with which each initial point is left out."""
    debug_from: int = flag(-1, source="3DGS", inert="no call of the rasterizer is dumped")
    """Iteration from which 3DGS's --debug is on."""
    detect_anomaly: bool = flag(False, source="3DGS", inert="the training step has no autograd graph to watch")
    """torch's anomaly mode."""
    zhx_debug: bool = flag(False, source="Grendel", inert="it prints statistics of Grendel-GS's kernels")
    """Statistics per tile."""
    time_image_loading: bool = flag(
        False, source="Grendel", inert="the time spent waiting for images is always in metrics.jsonl"
    )
    """Times of image loading."""
    nsys_profile: bool = flag(False, source="Grendel", inert="profilers show every kernel by its name")
    """NVTX ranges."""


@dataclasses.dataclass(frozen=True)
class ViewerConfig:
    """Viewer socket of 3DGS."""

    ip: str = flag("127.0.0.1", source="3DGS", inert=NO_SOCKET)
    """Address of the viewer socket."""
    port: int = flag(6009, source="3DGS", inert=NO_SOCKET)
    """Port of the viewer socket."""
    disable_viewer: bool = flag(False, source="3DGS", inert=NO_SOCKET)
    """No viewer socket."""
