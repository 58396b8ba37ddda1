# SPDX-License-Identifier: Apache-2.0
"""The flags that describe one training: data, drawing, optimization, density control, masks, output.

Each field is a flag of the same name; the string under it is its help text. Iterations count images, as in Grendel-GS.
Flags of what happens around it (checkpoints, processes, timers, debugging) are in `launch/flag_groups_process.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from launch.flag import flag

LATER_APPEARANCE = "per-image exposure and depth supervision are not part of this program; leave the flag out"
NEVER_READ = "LP-3DGS accepts it, too, and never reads it"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Data and model: what is reconstructed, from which images, and where it goes."""

    source_path: Path = flag(Path(), source="3DGS", short="-s")
    """Folder of the data set: COLMAP's sparse/0 and the image folder, or transforms_train.json and transforms_test.json
    (NeRF-synthetic, MatrixCity). Required for training."""
    model_path: Path = flag(Path(), source="3DGS", short="-m")
    """Folder for everything that is written. Not given: ./output/ and ten characters (OAR_JOB_ID or random)."""
    dataset_type: str = flag("auto", choices=("auto", "colmap", "blender", "matrixcity"))
    """Format of the data set. auto: a COLMAP model if there is one; else transforms_train.json, which is MatrixCity's
    when it has focal lengths in pixels, lenses of single frames or photos outside the folder, else Blender's."""
    images: str = flag("images", source="3DGS", short="-i")
    """Folder of the images inside a COLMAP data set, for example images_4; intrinsics are scaled to its true size."""
    resolution: int = flag(-1, source="3DGS", short="-r", minimum=-1)
    """1, 2, 4 or 8 divides the image size; -1 reduces images wider than 1600 pixels to 1600; any other number is the
    width in pixels, at most 4 times that of the images."""
    eval: bool = flag(False, source="3DGS")
    """Holds every --llffhold-th image (sorted by name) back as test set; in Blender scenes the frames of
    transforms_test.json, which are trained on without it. MatrixCity's test frames are always held back."""
    llffhold: int = flag(8, source="Grendel", minimum=1, unit="images")
    """Period of the test images of COLMAP data sets; stored with the model, so render.py needs no repetition."""
    num_train_cameras: int = flag(-1, source="Grendel", minimum=-1, unit="images")
    """Uses only the first so many training images; -1: all."""
    num_test_cameras: int = flag(-1, source="Grendel", minimum=-1, unit="images")
    """Uses only the first so many test images; -1: all."""
    white_background: bool = flag(False, source="3DGS", short="-w")
    """White instead of black behind the scene, in training, evaluation and behind transparent images. The usual choice
    for NeRF-synthetic."""
    sh_degree: int = flag(3, source="3DGS", minimum=0, maximum=3)
    """Highest degree of the spherical harmonics that model view-dependent colour."""
    data_device: str = flag(
        "cuda",
        source="3DGS",
        inert="images are always kept as 8-bit pixels in host memory, within --image_cache_gb",
    )
    """Where 3DGS keeps its images."""
    depths: str = flag("", source="3DGS", short="-d", refused=LATER_APPEARANCE)
    """Folder of depth maps for 3DGS's depth regularisation."""
    train_test_exp: bool = flag(False, source="3DGS", refused=LATER_APPEARANCE)
    """Exposure fitted on the left halves of the test images."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Drawing: which body draws, with what."""

    backend: str = flag(
        "diff",
        source="Grendel",
        choices=("diff", "default", "cpu", "reference", "cuda", "gsplat"),
    )
    """What draws. diff (alias default): masksplat on the device at hand, that is cuda or cpu; reference: plain torch on
    the CPU, trusted and slow; gsplat: gsplat's projection and, without masks, its rasterizer (needs a GPU and
    gsplat)."""
    threads: int = flag(0, minimum=0, unit="threads")
    """CPU threads for drawing and image decoding; 0: the cores this process may use."""
    image_cache_gb: float = flag(8.0, minimum=0.0, unit="GiB")
    """Memory for decoded 8-bit images; images beyond it are decoded again when needed."""
    cuda_graphs: bool = flag(True)
    """On GPUs of one machine, records the launches of a step and replays them until the set of Gaussians changes; the
    results are the same to the bit. Not with --enable_timer, which times the launches one by one."""
    antialiasing: bool = flag(False, source="3DGS")
    """Scales each opacity for the 0.3 pixel low-pass filter (Mip-Splatting's 2D filter); stored with the model."""
    convert_SHs_python: bool = flag(
        False, source="3DGS", inert="colours are always computed by the drawing body; the result is the same"
    )
    """3DGS: spherical harmonics in PyTorch."""
    compute_cov3D_python: bool = flag(
        False, source="3DGS", inert="covariances are always computed by the drawing body; the result is the same"
    )
    """3DGS: covariances in PyTorch."""
    debug: bool = flag(False, source="3DGS", inert="no call of the rasterizer is dumped")
    """3DGS: dumps the rasterizer's inputs when it fails."""


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """Optimization: length, batches, loss and learning rates (Adam, eps 1e-15)."""

    iterations: int = flag(30_000, source="3DGS", minimum=1, unit="images")
    """Length of the training, counted in images: a step with --bsz 4 advances by 4."""
    stop_after: int = flag(0, minimum=0, unit="images")
    """Stops after this image with a checkpoint and nothing else, as if interrupted: all schedules stay those of
    --iterations. 0: goes on to the end."""
    bsz: int = flag(1, source="Grendel", minimum=1, unit="images")
    """Images per optimizer step."""
    lr_scale_mode: str = flag("sqrt", source="Grendel", choices=("sqrt", "linear", "accumu"))
    """How learning rates follow --bsz B. sqrt: lr*sqrt(B), betas**B, eps/sqrt(B); linear: lr*B; both with the mean
    gradient; accumu: unchanged rates, summed gradient."""
    seed: int = flag(0, minimum=0)
    """Seed of the view order, mask samples, split offsets and background colours. Same seed, same result."""
    lambda_dssim: float = flag(0.2, source="3DGS", minimum=0.0, maximum=1.0)
    """Weight of 1 - SSIM in the loss; L1 has the rest."""
    position_lr_init: float = flag(1.6e-4, source="3DGS", minimum=0.0)
    """Learning rate of the centres at the start, times the scene extent."""
    position_lr_final: float = flag(1.6e-6, source="3DGS", minimum=0.0)
    """Learning rate of the centres after --position_lr_max_steps, times the scene extent; log-linear in between."""
    position_lr_delay_mult: float = flag(
        0.01, source="3DGS", inert="3DGS multiplies by it only when a delay is set, and no flag of any program sets one"
    )
    """Start factor of 3DGS's delayed position schedule."""
    position_lr_max_steps: int = flag(30_000, source="3DGS", minimum=1, unit="images")
    """Length of the position schedule; it does not follow --iterations."""
    feature_lr: float = flag(0.0025, source="3DGS", minimum=0.0)
    """Learning rate of the base colour; the higher harmonics get a twentieth."""
    opacity_lr: float = flag(0.05, source="3DGS", minimum=0.0)
    """Learning rate of the opacity logits."""
    opacity_decay: float = flag(0.05, minimum=0.0)
    """How far each opacity logit falls in a pass over the training views (at least 40 images), whatever its gradient;
    follows the learning rate. What no view holds up goes: better test views, fewer Gaussians. 0: as 3DGS."""
    scaling_lr: float = flag(0.005, source="3DGS", minimum=0.0)
    """Learning rate of the log scales."""
    rotation_lr: float = flag(0.001, source="3DGS", minimum=0.0)
    """Learning rate of the quaternions."""
    anneal_share: float = flag(0.1, minimum=0.0, maximum=1.0)
    """Last part of --iterations in which all learning rates but the masks' fall; 0: as 3DGS, only the centres'."""
    anneal_to: float = flag(0.05, minimum=1e-6, maximum=1.0)
    """Factor on the learning rates that --anneal_share ends at; log-linear."""
    lr_scale_loss: float = flag(1.0, source="Grendel", minimum=0.0)
    """Factor on the image loss of every view (Adam makes it nearly invisible; it weighs against --lambda_mask)."""
    lr_scale_pos_and_scale: float = flag(1.0, source="Grendel", minimum=0.0)
    """Factor on the learning rates of centres and scales."""
    random_background: bool = flag(False, source="3DGS")
    """A random colour behind each training view and its transparent photos; evaluation keeps black or white."""
    optimizer_type: str = flag(
        "default",
        source="3DGS",
        choices=("default", "sparse_adam"),
        refused="only dense Adam, as torch.optim.Adam, is implemented; leave the flag out",
    )
    """3DGS's choice between dense and sparse Adam."""
    exposure_lr_init: float = flag(0.01, source="3DGS", refused=LATER_APPEARANCE)
    """Learning rate of 3DGS's exposure matrices at the start."""
    exposure_lr_final: float = flag(0.001, source="3DGS", refused=LATER_APPEARANCE)
    """Learning rate of the exposure matrices at the end."""
    exposure_lr_delay_steps: int = flag(0, source="3DGS", refused=LATER_APPEARANCE)
    """Delay of the exposure schedule."""
    exposure_lr_delay_mult: float = flag(0.0, source="3DGS", refused=LATER_APPEARANCE)
    """Start factor of the exposure schedule."""
    depth_l1_weight_init: float = flag(1.0, source="3DGS", refused=LATER_APPEARANCE)
    """Weight of 3DGS's depth loss at the start."""
    depth_l1_weight_final: float = flag(0.01, source="3DGS", refused=LATER_APPEARANCE)
    """Weight of the depth loss at the end."""


@dataclasses.dataclass(frozen=True)
class DensityFlags:
    """Adaptive density control: clone, split, prune and opacity reset of 3DGS."""

    densify_from_iter: int = flag(500, source="3DGS", minimum=0, unit="images")
    """Events happen after this iteration (strictly)."""
    densify_until_iter: int = flag(15_000, source="3DGS", minimum=0, unit="images")
    """Events happen before this iteration (strictly, as in 3DGS; Grendel-GS includes it)."""
    densification_interval: int = flag(100, source="3DGS", minimum=1, unit="images")
    """Period of clone, split and prune."""
    densify_grad_threshold: float = flag(2e-4, source="3DGS", minimum=0.0)
    """Mean norm of the screen-space gradient (NDC units) from which a Gaussian is cloned or split."""
    percent_dense: float = flag(0.01, source="3DGS", minimum=0.0)
    """Largest scale, as a share of the scene extent, up to which a Gaussian is cloned; above it is split."""
    min_opacity: float = flag(0.005, source="Grendel", minimum=0.0, maximum=1.0)
    """Gaussians below this opacity are pruned at densification events."""
    opacity_reset_interval: int = flag(3000, source="3DGS", minimum=1, unit="images")
    """Period of the reset of all opacities to at most 0.01; from then on too large Gaussians are pruned, too."""
    opacity_reset_until_iter: int = flag(-1, source="Grendel", minimum=-1, unit="images")
    """Last iteration for opacity resets; -1: as long as densification lasts."""
    disable_auto_densification: bool = flag(False, source="Grendel")
    """No clone, split, opacity prune or opacity reset; masks still prune at --mask_prune_iter."""
    densify_memory_limit_percentage: float = flag(
        0.9,
        source="Grendel",
        inert="training does not stop growing by itself: when memory ends, it says what to do",
    )
    """Share of device memory at which Grendel-GS stops densifying for good."""


@dataclasses.dataclass(frozen=True)
class MaskFlags:
    """Probabilistic masks (MaskGaussian): each Gaussian learns the probability that it exists."""

    prune_method: str = flag(
        "mask", source="LP-3DGS", choices=("mask", "3dgs", "rad_splat", "mini_splatting", "compact_3dgs")
    )
    """mask: learned probabilistic masks. 3dgs: none, the plain 3DGS. rad_splat, mini_splatting: by importance scores, a
    percentage or with a learned mask (LP-3DGS). compact_3dgs: hard masks on opacity and scale."""
    setting: str = flag("beta", choices=("alpha", "beta", "gamma"))
    """The paper's presets of the mask loss: alpha (0.1, iterations 19000-20000: quality), beta (0.0005, 0-30000),
    gamma (0.001, 0-30000: smallest). Flags given beside it win."""
    lambda_mask: float = flag(5e-4, source="MaskGaussian", minimum=0.0)
    """Weight of the squared mean of all masks in the loss: larger prunes more. compact_3dgs: of the mean, also 0.0005;
    LP-3DGS's learned mask: of the mean, 0.02 unless given."""
    mask_from_iter: int = flag(0, source="MaskGaussian", minimum=0, unit="images")
    """First iteration of the mask loss; after densification also the first of the mask prunes."""
    mask_until_iter: int = flag(30_000, source="MaskGaussian", minimum=0, unit="images")
    """Last iteration of the mask loss (sampling goes on)."""
    mask_lr: float = flag(0.01, source="MaskGaussian", minimum=0.0)
    """Learning rate of each of the paper's two mask logits; our single logit gets twice as much, which is the same.
    compact_3dgs: of its single number, as it is. LP-3DGS's is fixed at 0.05."""
    mask_prune_iter: int = flag(1000, source="MaskGaussian", minimum=1, unit="images")
    """Period of mask pruning after densification has ended."""


@dataclasses.dataclass(frozen=True)
class PruneFlags:
    """Other pruning methods: LP-3DGS, Compact-3DGS, percentages, target sizes, pruning of trained models."""

    use_importance_mask: bool = flag(False, source="LP-3DGS")
    """With rad_splat or mini_splatting: learns a mask on the score in a window, instead of pruning a percentage."""
    prune_iterations: tuple[int, ...] = flag((19_500,), source="LP-3DGS", minimum=0, unit="images")
    """Each starts a window in which LP-3DGS's mask is learned; at its end is a prune. Windows lie behind
    --densify_until_iter."""
    train_mask_iters: int = flag(500, source="LP-3DGS", minimum=1, unit="images")
    """Length of the window."""
    gumbel_temp: float = flag(0.5, source="LP-3DGS", minimum=0.001)
    """Temperature of the Gumbel-sigmoid."""
    prune_use_percent_iterations: tuple[int, ...] = flag((20_000,), source="LP-3DGS", minimum=1, unit="images")
    """Iterations at which a percentage is pruned (rad_splat, mini_splatting without --use_importance_mask)."""
    prune_percent: float = flag(0.6, source="LP-3DGS", minimum=0.0, maximum=1.0)
    """Share that percent pruning removes, 0 to 1."""
    mask_estimator: str = flag("auto", choices=("auto", "gumbel", "ste"))
    """Form of the mask. auto: gumbel with a score, ste in compact_3dgs. The other two are ablations of LP-3DGS's paper:
    ste with a score (its Table 4); gumbel in compact_3dgs, which then has LP-3DGS's window (its Table 3)."""
    lp_compat: bool = flag(False)
    """LP-3DGS's mask as its published program computes it, defects included (docs/parity.md)."""
    target_gaussians: int = flag(0, minimum=0)
    """Number of Gaussians the model shall end with, 0: none. mask: pressure on the masks is controlled and ten prunes
    lead to the number; rad_splat, mini_splatting: percent pruning goes down to it."""
    target_mb: float = flag(0.0, minimum=0.0, unit="MB")
    """The same as size of the saved ply in millions of bytes; 0: none."""
    scale_schedules: bool = flag(False)
    """Multiplies every schedule flag that is not given, in the density, mask and pruning groups and
    --position_lr_max_steps, by --iterations / 30000, and divides --lambda_mask of the learned masks by its power of
    4/3. Intervals of densification and SH degrees stay."""
    random_prune_ratio: float = flag(0.1, source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    simplification_iteration1: int = flag(15_000, source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    simplification_iteration2: int = flag(20_000, source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    preserving_ratio: float = flag(0.1, source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    rad_prune_threshold: float = flag(0.01, source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    rad_prune_iterations: tuple[int, ...] = flag((19_500,), source="LP-3DGS", inert=NEVER_READ)
    """Unused in LP-3DGS."""
    prune_finetune: bool = flag(False)
    """Prunes and finetunes the trained model of --start_pointcloud or --start_checkpoint, as MaskGaussian's
    prune_finetune.py: iterations 30001 to 35000, no density control, --lambda_mask 0.02, learning rates times 0.95
    every 400 iterations. Flags given beside it win."""
    start_pointcloud: str = flag("", source="MaskGaussian")
    """Trained ply, of any trainer, to start from; it counts as a model of 30 000 iterations."""
    densify_iteration: tuple[int, ...] = flag(
        (-1,), source="MaskGaussian", inert="MaskGaussian accepts it, too, and never reads it"
    )
    """Unused in MaskGaussian's prune_finetune.py."""


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Output: what is measured, saved and shown, and when."""

    test_iterations: tuple[int, ...] = flag((), source="3DGS", unit="images")
    """Iterations after which the test set (and five training views) are measured. Not given: 7000, 30000 and the last;
    -1 or nothing: never."""
    save_iterations: tuple[int, ...] = flag((), source="3DGS", unit="images")
    """Iterations after which the model is written. Not given: 7000, 30000; the last one is always written."""
    render_and_evaluate: bool = flag(False)
    """After training, renders the train and test views and measures the test views, as render.py and metrics.py do."""
    report: bool = flag(True)
    """Writes report.html into the model folder at the end."""
    log_interval: int = flag(250, source="Grendel", minimum=1, unit="images")
    """Period of the step lines in metrics.jsonl."""
    quiet: bool = flag(False, source="3DGS")
    """Nothing on the terminal except errors; train.log gets everything."""
    doctor: bool = flag(False)
    """Trains nothing: lists what this machine has, what each missing part would give and how to install it; with -s it
    also checks the data."""
    log_folder: str = flag(
        "/tmp/gaussian_splatting",
        source="Grendel",
        inert="logs always go to the model folder, as they do in Grendel-GS",
    )
    """Grendel-GS: folder of the logs, overwritten there by the model path."""
    wandb_run_name: str = flag("", source="LP-3DGS", inert="curves go to metrics.jsonl and report.html, not to wandb")
    """LP-3DGS: name of the run at wandb."""
