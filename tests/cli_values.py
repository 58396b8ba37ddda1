# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command lines share: parsed values in flat form, and a predecessor's model folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launch.cli import parse_train
from launch.config import to_plain


def train(command: str, **environment: str) -> dict[str, object]:
    """The flat values of a train.py command line."""
    return {name: value for group in plain(command, **environment).values() for name, value in group.items()}


def plain(command: str, **environment: str) -> dict[str, dict[str, object]]:
    config = to_plain(parse_train(shlex.split(command), environment))
    return {name: group for name, group in config.items() if name != "given"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as a predecessor leaves it: nothing but cfg_args."""
    text = (
        "Namespace(sh_degree=2, source_path='/data/garden', model_path='/elsewhere', images='images_4', resolution=-1, "
        "white_background=True, data_device='cuda', eval=True, prune_method='mini_splatting')"
    )
    (tmp_path / "cfg_args").write_text(text)
    return tmp_path
