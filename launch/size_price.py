# SPDX-License-Identifier: Apache-2.0
"""What a target size costs: PSNR and Gaussians before the first prune and at the end, from the run's own log.

Both are measured in the run, whatever --test_iterations says. Between them lies training, too: after density control
PSNR still rises, so a price can be negative. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from launch.config import TrainConfig
from launch.finetune import trained_before
from launch.log_reader import Record, read_log
from launch.metrics_log import MetricsLog
from launch.prune_checks import has_target, target_start
from scene.model_folder import ModelFolder


@dataclass(frozen=True)
class SizePrice:
    """Means over the views of `split` before pruning and at the end, dB; num_bytes: of the saved ply."""

    split: str
    iteration_before: int
    psnr_before: float
    num_before: int
    iteration: int
    psnr: float
    num_gaussians: int
    num_bytes: int

    @property
    def price_db(self) -> float:
        """What is lost by the size, dB."""
        return self.psnr_before - self.psnr

    def __str__(self) -> str:
        """One sentence for people."""
        return (
            f"Target size: {self.num_gaussians:,} Gaussians ({self.num_bytes / 1e6:.2f} MB) with {self.split} PSNR "
            f"{self.psnr:.2f} dB. Before pruning, at iteration {self.iteration_before}: {self.num_before:,} with "
            f"{self.psnr_before:.2f} dB. The price is {self.price_db:+.2f} dB, with what the "
            f"{self.iteration - self.iteration_before} iterations of training since then have gained."
        )


def price_iterations(config: TrainConfig) -> tuple[int, ...]:
    """The iterations that are measured for the price: before the first prune, and the last; none without a target."""
    if not has_target(config):
        return ()
    before = trained_before(config)
    if config.mask.prune_method == "mask":
        first = max(before + 1, target_start(config))
    else:
        first = min(each for each in config.prune.prune_use_percent_iterations if each > before)
    return first, config.optimization.iterations


def tell_price(config: TrainConfig) -> str | None:
    """Write the price to the log of a training that has ended; returns the sentence to print, None without a target.

    Raises: InputError when the log cannot be read or written.
    """
    if not has_target(config):
        return None
    folder = ModelFolder.open(config.model.model_path)
    before, last = price_iterations(config)
    evaluations = read_log(folder.metrics).evaluations
    split = "test" if any(record["split"] == "test" for record in evaluations) else "train"
    first, final = (_at(evaluations, split, iteration) for iteration in (before, last))
    if first is None or final is None:
        return f"Target size: iteration {before}, before pruning, was not measured in this run: its price is not known."
    price = SizePrice(
        split=split,
        iteration_before=before,
        psnr_before=first["psnr"],
        num_before=first["num_gaussians"],
        iteration=last,
        psnr=final["psnr"],
        num_gaussians=final["num_gaussians"],
        num_bytes=folder.point_cloud(last).stat().st_size,
    )
    with MetricsLog(folder.metrics, append=True) as log:
        log.write("size_price", asdict(price), price_db=price.price_db)
    return str(price)


def _at(evaluations: Sequence[Record], split: str, iteration: int) -> Record | None:
    """The newest measure of a split at an iteration."""
    found = [each for each in evaluations if each["split"] == split and each["iteration"] == iteration]
    return found[-1] if found else None
