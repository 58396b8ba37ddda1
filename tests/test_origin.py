# SPDX-License-Identifier: Apache-2.0
"""What a folder's training was started with: what counts as the same one, and what is refused, begun anew or kept."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from launch.cli import parse_train
from launch.config import to_plain
from launch.origin import STARTED_FILE, Origin, check_origin, differences, origin_of
from scene.errors import InputError
from scene.model_folder import ModelFolder


def origin(flags: str, source: str = "/data/fox", base: str | None = None) -> Origin:
    return Origin(Path(source), tuple(shlex.split(flags)), None if base is None else tuple(shlex.split(base)))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--eval --iterations 70", "--iterations 7e1 --eval"),
        ("--lambda_mask 1 --lambda_mask 2", "--lambda-mask 2"),
        ("", "--setting beta"),
        ("--eval", "--eval --no_report --threads 3 --test_iterations 5 --checkpoint_iterations 9 --quiet"),
        ("--eval", "--eval --data_device cpu --port 3"),
        ("--prune_finetune", "--prune_finetune --iterations 35000"),
    ],
)
def test_the_same_training_however_it_was_typed(before: str, now: str) -> None:
    assert differences(origin(before), origin(now)) == []


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "--lambda_mask 0.001", ["--lambda_mask was 0.0005 and is 0.001"]),
        ("--eval", "", ["--eval was on and is off"]),
        (
            "--prune_method rad_splat",
            "--prune_method mini_splatting --prune_percent .5",
            ["--prune_method was rad_splat and is mini_splatting", "--prune_percent was 0.6 and is 0.5"],
        ),
        ("--scale_schedules", "--scale_schedules --iterations 70", ["--iterations was 30000 and is 70"]),
        ("--setting alpha", "", ["--setting was alpha and is beta"]),
        (
            "--prune_use_percent_iterations 18000 19000",
            "",
            ["--prune_use_percent_iterations was 18000 19000 and is 20000"],
        ),
        ("--start_checkpoint a.pth", "", ["--start_checkpoint was a.pth and is nothing"]),
        ("--seed 1", "--seed 2", ["--seed was 1 and is 2"]),
    ],
)
def test_what_differs_is_named_by_the_flags_that_were_typed(before: str, now: str, expected: list[str]) -> None:
    assert differences(origin(before), origin(now)) == expected


def test_data_bases_and_flags_of_earlier_versions_are_compared_too() -> None:
    assert differences(origin(""), origin("", source="/data/garden")) == [
        "--source_path was /data/fox and is /data/garden"
    ]
    post = "--prune_finetune"
    assert differences(origin(post, base="--bsz 2"), origin(post, base="--bsz 2 --no_report")) == []
    assert differences(origin(post, base="--bsz 2"), origin(post, base="")) == [
        "of the model it starts from, --bsz was 2 and is 1"
    ]
    assert differences(origin(post), origin(post, base="--bsz 2")) == [], "nobody wrote the base down"
    (sentence,) = differences(origin("--long_gone 3"), origin(""))
    assert sentence.startswith("its flags --long_gone 3 are not understood any more")
    with pytest.raises(InputError, match="--long_come"):
        differences(origin(""), origin("--long_come 3"))


def save_something(folder: Path, kind: str) -> None:
    """What an unfinished or finished training has left in its folder."""
    path = folder / {
        "checkpoint": "checkpoints/20/manifest.json",
        "model": "point_cloud/iteration_70/point_cloud.ply",
        "measures": "results.json",
    }.get(kind, "train.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("kind", ["checkpoint", "model", "measures"])
def test_what_is_worth_keeping_is_never_taken_for_another_training(tmp_path: Path, kind: str) -> None:
    before, now = origin("--lambda_mask 0.5"), origin("--lambda_mask 0.25")
    assert check_origin(tmp_path / "none", now) == ""
    before.write(tmp_path)
    save_something(tmp_path, kind)
    assert origin_of(tmp_path) == before and check_origin(tmp_path, before) == ""
    sentence = f"{tmp_path} holds a run of other flags or data: --lambda_mask was 0.5 and is 0.25. Choose another"
    with pytest.raises(InputError, match=re.escape(sentence) + ".* with -o, or remove"):
        check_origin(tmp_path, now)
    (tmp_path / STARTED_FILE).unlink()
    with pytest.raises(InputError, match="neither started.json nor config.json says with which flags"):
        check_origin(tmp_path, before)


def test_where_nothing_was_saved_another_training_begins_anew(tmp_path: Path) -> None:
    origin("--lambda_mask 0.5").write(tmp_path)
    save_something(tmp_path, "log alone")
    (tmp_path / "checkpoints" / ".20.partial").mkdir(parents=True)
    notice = check_origin(tmp_path, origin("--lambda_mask 0.25"))
    assert notice.startswith(f"{tmp_path} is begun anew (--lambda_mask was 0.5 and is 0.25)")


def test_trainings_from_before_are_known_by_what_train_py_wrote(tmp_path: Path) -> None:
    """config.json has the command with its own start, which is none of the flags that are compared."""
    own = f"-s data -m {tmp_path} --eval --lambda_mask 0.5 --start_checkpoint a/base --quiet".split()
    ModelFolder(tmp_path).write_config(to_plain(parse_train(own)), ["train.py", *own])
    save_something(tmp_path, "measures")
    source = str(Path("data").absolute())
    assert check_origin(tmp_path, origin("--eval --lambda_mask 0.5", source)) == ""
    with pytest.raises(InputError, match="--eval was on and is off"):
        check_origin(tmp_path, origin("--lambda_mask 0.5", source))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"source": "a"}', '{"source": 1, "flags": []}'])
def test_damaged_notes_are_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / STARTED_FILE).write_text(text)
    with pytest.raises(InputError, match=r"started\.json is damaged .*; remove the run's folder"):
        check_origin(tmp_path, origin(""))


def test_notes_are_plain_json(tmp_path: Path) -> None:
    made = origin("--eval -w", base="--bsz 2")
    made.write(tmp_path)
    expected = {"source": "/data/fox", "flags": ["--eval", "-w"], "base": ["--bsz", "2"]}
    assert json.loads((tmp_path / STARTED_FILE).read_text()) == expected and origin_of(tmp_path) == made
