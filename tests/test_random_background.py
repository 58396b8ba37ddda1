# SPDX-License-Identifier: Apache-2.0
"""--random_background: behind the Gaussians and behind transparent photos it is the same colour, at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.evaluation import evaluate
from launch.training import Training, build_training
from transforms_builder import write_blender, write_cloud

FLAGS = ("--quiet", "--no-report", "--bsz", "2", "--random_background", "--eval")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    source = write_blender(tmp_path_factory.mktemp("blender"))
    write_cloud(source / "points3d.ply")
    config = parse_train(["-s", str(source), "-m", str(source / "m"), *FLAGS])
    return build_training(config, Communicator(), show_progress=False)


def test_photos_stand_on_the_colour_of_their_step(training: Training) -> None:
    colors = []
    for step in range(6):
        batch = training.batch(step)
        cameras = [training.scene.train[view] for view in training.pixels.views(step)]
        for camera, background, photo in zip(cameras, batch.backgrounds, batch.photos, strict=True):
            rgba = np.asarray(Image.open(camera.image_path)).astype(float)
            alpha = rgba[..., 3:] / 255
            expected = rgba[..., :3] * alpha + 255 * background.numpy() * (1 - alpha)
            assert np.abs(photo.numpy() - expected).max() <= 1.001
            assert (alpha == 0).any()
            colors.append(tuple(background.tolist()))
        again = training.batch(step)
        assert all(torch.equal(one, other) for one, other in zip(batch.photos, again.photos, strict=True))
    assert len(set(colors)) == len(colors) == 12


def test_measures_compare_with_the_photos_on_black(training: Training, tmp_path: Path) -> None:
    """With training views that keep their alpha, the numbers are those of a run whose photos are on black for good."""
    arguments = ["-s", str(training.scene.source), "-m", str(tmp_path / "m"), "--quiet", "--eval", "--bsz", "2"]
    plain = build_training(parse_train(arguments), Communicator(), show_progress=False)
    window = plain.window(0)
    found = {measured.split: measured for measured in evaluate(training, window)}
    for expected in evaluate(plain, window):
        assert found[expected.split].psnr == pytest.approx(expected.psnr, abs=0.02)
        assert found[expected.split].ssim == pytest.approx(expected.ssim, abs=1e-3)
