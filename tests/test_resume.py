# SPDX-License-Identifier: Apache-2.0
"""Law 6 through train.py: n + m steps are n steps, save, load, m steps, bit for bit; also what fits, and logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch.training
import train
from launch.log_reader import read_log
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import load_ply

LENGTH = 60
SHORT = (
    *("--densify_from_iter", "10", "--densification_interval", "20", "--quiet", "--no-report", "--sh_degree", "2"),
    *("--densify_grad_threshold", "1e-5", "--densify_until_iter", "50", "--opacity_reset_interval", "40"),
    *("--mask_lr", "0.4", "--lambda_mask", "0.5", "--mask_prune_iter", "10", "--log_interval", "10"),
    *("--test_iterations", "--random_background"),
)
POINTS = (17, 20, 40, 55)
"""In the middle of an interval, at a densification, at densification and opacity reset, between prunes."""


def run(source: Path, target: Path, *flags: str, iterations: int = LENGTH) -> None:
    arguments = ["-s", str(source), "-m", str(target), "--eval", "--iterations", str(iterations), *SHORT, *flags]
    assert train.main(arguments) == 0


def records(target: Path) -> list[dict]:
    return [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]


def ply_bytes(target: Path) -> bytes:
    return ModelFolder.open(target).point_cloud(LENGTH).read_bytes()


def final_tensors(target: Path) -> dict[str, torch.Tensor]:
    return load_file(target / "checkpoints" / str(LENGTH) / "shard-00000-of-00001.safetensors")


def assert_equal_ends(one: Path, other: Path) -> None:
    first, second = final_tensors(one), final_tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert ply_bytes(one) == ply_bytes(other)
    manifests = [
        json.loads((each / "checkpoints" / str(LENGTH) / "manifest.json").read_text()) for each in (one, other)
    ]
    assert manifests[0]["num_updates"] == manifests[1]["num_updates"]
    assert manifests[0]["shards"] == manifests[1]["shards"]


@pytest.fixture(scope="module", autouse=True)
def early_harmonics() -> object:
    """Degrees of spherical harmonics that begin at images 25 and 50, inside the short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.training, "SH_DEGREE_INTERVAL", 25)
        yield


@pytest.fixture(scope="module")
def straight(any_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 images that wrote checkpoints on the way. Do not write into it."""
    target = tmp_path_factory.mktemp("straight") / "m"
    run(any_scene, target, "--checkpoint_iterations", *map(str, (*POINTS, LENGTH)))
    return target


def test_everything_happens_in_the_short_run(straight: Path) -> None:
    edits = [record for record in records(straight) if record["kind"] == "edit"]
    for event in ("cloned", "split", "pruned_mask", "opacity_reset"):
        assert any(edit[event] for edit in edits), event
        assert any(edit[event] and edit["iteration"] > POINTS[0] for edit in edits), event
    params = final_tensors(straight)
    assert float(params["params.shN"].abs().max()) > 0
    assert float(params["exp_avg.shN"][:, 3:].abs().max()) > 0  # degree 2 was in use


def test_writing_checkpoints_changes_nothing(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    run(any_scene, tmp_path / "m", "--threads", "2")
    assert ply_bytes(tmp_path / "m") == ply_bytes(straight)
    assert not (tmp_path / "m" / "checkpoints").exists()


@pytest.mark.parametrize("number", POINTS)
def test_law_6(any_scene: Path, straight: Path, tmp_path: Path, number: int) -> None:
    start = str(straight / "checkpoints" / str(number))
    run(any_scene, tmp_path / "m", "--start_checkpoint", start, "--checkpoint_iterations", str(LENGTH))
    assert_equal_ends(straight, tmp_path / "m")
    steps = [record["iteration"] for record in records(tmp_path / "m") if record["kind"] == "step"]
    assert steps == [each for each in range(10, LENGTH + 1, 10) if each > number]


@pytest.mark.parametrize("method", ["mask", "3dgs"])
def test_law_6_with_batches(any_scene: Path, tmp_path: Path, method: str) -> None:
    """A checkpoint asked for in the middle of a batch stands behind that batch."""
    flags = ("--bsz", "3", "--prune_method", method)
    run(any_scene, tmp_path / "a", *flags, "--checkpoint_iterations", "29", str(LENGTH))
    start = ("--start_checkpoint", str(tmp_path / "a"), "--checkpoint_iterations", str(LENGTH))
    (tmp_path / "a" / "checkpoints" / str(LENGTH)).rename(tmp_path / "end")
    run(any_scene, tmp_path / "b", *flags, *start)
    (tmp_path / "end").rename(tmp_path / "a" / "checkpoints" / str(LENGTH))
    assert_equal_ends(tmp_path / "a", tmp_path / "b")
    resumed = next(record for record in records(tmp_path / "b") if record["kind"] == "resumed")
    assert resumed["iteration"] == 30


def test_an_interrupted_run_goes_on_in_its_folder(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    """The same command again: logs are appended, what was done twice counts once, and the end is the same."""
    target = tmp_path / "m"
    flags = ("--checkpoint_iterations", "20", str(LENGTH), "--auto_start_checkpoint")
    run(any_scene, target, *flags, iterations=35)  # the end at 35 stands for a crash
    assert "the training starts at the beginning" in (target / "train.log").read_text()
    run(any_scene, target, *flags)
    assert_equal_ends(straight, target)
    log = (target / "train.log").read_text()
    assert log.count("started ") == 2
    assert f"Going on behind image 20 from {target / 'checkpoints' / '20'}" in log
    kinds = [record["kind"] for record in records(target)]
    assert (kinds.count("run"), kinds.count("resumed"), kinds.count("end")) == (2, 1, 2)
    read = read_log(target / "metrics.jsonl")
    assert [step["iteration"] for step in read.steps] == [10, 20, 30, 40, 50, 60]
    seconds = [step["seconds"] for step in read.steps]
    assert seconds == sorted(seconds)
    assert read.end is not None
    assert read.end["seconds"] >= seconds[-1]
    assert read.run["config"]["optimization"]["iterations"] == LENGTH
    straight_log = read_log(straight / "metrics.jsonl")
    assert [step["loss"] for step in read.steps] == [step["loss"] for step in straight_log.steps]
    assert [edit["num_gaussians"] for edit in read.edits] == [edit["num_gaussians"] for edit in straight_log.edits]


def test_a_stopped_training_goes_on_to_the_same_end(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    """--stop_after leaves a checkpoint and no model, behind the batch that holds the image; schedules are unchanged."""
    target = tmp_path / "m"
    run(any_scene, target, "--stop_after", "57")  # learning rates fall from 54 on
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["57"]
    assert not (target / "point_cloud").exists()
    assert "stopped after 57 of 60 images" in (target / "train.log").read_text()
    run(any_scene, target, "--auto_start_checkpoint", "--checkpoint_iterations", str(LENGTH))
    assert_equal_ends(straight, target)


def test_the_progress_bar_starts_where_the_training_does(
    any_scene: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Watched(train.TrainingProgress):
        def __init__(self, total: int, *, initial: int = 0, enabled: bool = True) -> None:
            super().__init__(total, initial=initial, enabled=True)
            bars.append((total, initial))

        def close(self) -> None:
            bars.append(self._bar.n)
            super().close()

    monkeypatch.setattr(train, "TrainingProgress", Watched)
    run(any_scene, tmp_path / "m", "--start_checkpoint", str(straight / "checkpoints" / "55"), iterations=58)
    assert bars == [(58, 55), 58]


def test_a_finished_run_that_is_started_again_does_nothing(any_scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    flags = ("--checkpoint_iterations", "6", "--auto_start_checkpoint")
    run(any_scene, target, *flags, iterations=6)
    before = ModelFolder.open(target).point_cloud(6).read_bytes()
    run(any_scene, target, *flags, iterations=6)
    assert ModelFolder.open(target).point_cloud(6).read_bytes() == before


def test_the_final_prune_does_not_alter_the_checkpoint(straight: Path) -> None:
    """Law 8: the ply holds the rows with p >= 1/2 of the checkpoint of the same image, which holds the others, too."""
    tensors = final_tensors(straight)
    kept = tensors["params.mask_logits"] >= 0
    saved = load_ply(ModelFolder.open(straight).point_cloud(LENGTH))
    assert 0 < int(kept.sum()) == len(saved["means"]) < len(kept)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    target = copied(straight, tmp_path / "m", "20", "55")
    damage(target / "checkpoints" / "55")
    (target / "checkpoints" / ".57.partial").mkdir()
    run(any_scene, target, "--auto_start_checkpoint", "--checkpoint_iterations", str(LENGTH))
    assert_equal_ends(straight, target)
    log = (target / "train.log").read_text()
    assert "55 was passed over: the shard" in log
    assert ".57.partial was passed over: the run ended while it was being written" in log


def test_with_damaged_checkpoints_only_nothing_is_started(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    target = copied(straight, tmp_path / "m", "20")
    damage(target / "checkpoints" / "20")
    with pytest.raises(InputError, match="none of the checkpoints in .* can be used"):
        run(any_scene, target, "--auto_start_checkpoint")


def test_a_new_training_sets_old_checkpoints_aside(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    target = copied(straight, tmp_path / "m", "55")
    run(any_scene, target, "--checkpoint_iterations", "3", iterations=3)
    assert [path.name for path in (target / "checkpoints").iterdir()] == ["3"]
    assert (target / "checkpoints-before-1" / "55" / "manifest.json").exists()
    assert "checkpoints-before-1" in (target / "train.log").read_text()


def test_files_of_another_program_are_never_replaced(any_scene: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "m" / "checkpoints" / "3" / "chkpnt_ws=1_rk=0.pth"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    run(any_scene, tmp_path / "m", "--checkpoint_iterations", "3", iterations=3)
    assert (tmp_path / "m" / "checkpoints-before-1" / "3" / theirs.name).read_bytes() == b"precious"


def test_an_older_checkpoint_begins_another_branch(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    """What lay behind it is moved: it would be taken for the newest of the branch that goes on."""
    target = copied(straight, tmp_path / "m", "20", "40", "55")
    start = ("--start_checkpoint", str(target / "checkpoints" / "20"), "--lambda_dssim", "0.5")
    run(any_scene, target, *start, "--checkpoint_iterations", "23", iterations=23)
    assert sorted(path.name for path in (target / "checkpoints").iterdir()) == ["20", "23"]
    assert sorted(path.name for path in (target / "checkpoints-before-1").iterdir()) == ["40", "55"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sh_degree", "3"), "give --sh_degree 2"),
        (("--bsz", "3"), "give --bsz 1"),
        (("--iterations", "15"), "raise --iterations"),
        (("--iterations", "20"), "raise --iterations"),
        (("--llffhold", "4"), r"cameras differ \(other flags: --llffhold \(was 8\)\)"),
        (("--resolution", "2"), "cameras differ"),
    ],
)
def test_what_does_not_fit_is_an_error(
    any_scene: Path, straight: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(any_scene, tmp_path / "m", "--start_checkpoint", str(straight / "checkpoints" / "20"), *flags)


def test_other_data_is_an_error(straight: Path, tmp_path: Path, any_scene: Path) -> None:
    start = str(straight / "checkpoints" / "20")
    other = tmp_path / "data"
    other.mkdir()
    (other / "sparse").symlink_to(any_scene / "sparse")
    (other / "images").mkdir()
    photos = sorted((any_scene / "images").iterdir())
    for photo in photos:
        (other / "images" / photo.name).write_bytes(photo.read_bytes() + bytes(photo == photos[0]))
    with pytest.raises(InputError, match="photos differ .the folder's content has changed"):
        run(other, tmp_path / "m", "--start_checkpoint", start)


def test_changed_flags_are_said_and_used(any_scene: Path, straight: Path, tmp_path: Path) -> None:
    start = ("--start_checkpoint", str(straight / "checkpoints" / "55"), "--lambda_dssim", "0.5", "--threads", "1")
    run(any_scene, tmp_path / "m", *start)
    log = (tmp_path / "m" / "train.log").read_text()
    assert "--lambda_dssim was 0.2 in the checkpoint and is 0.5 now, which is used." in log
    assert "--threads was" not in log
    assert ply_bytes(tmp_path / "m") != ply_bytes(straight)


def test_a_start_that_does_not_exist_is_an_error(any_scene: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run(any_scene, tmp_path / "m", "--start_checkpoint", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        run(any_scene, tmp_path / "m", "--start_checkpoint", str(tmp_path / "empty"))


def copied(straight: Path, target: Path, *numbers: str) -> Path:
    """A model folder with copies of some of a run's checkpoints."""
    for number in numbers:
        folder = target / "checkpoints" / number
        folder.mkdir(parents=True)
        for file in (straight / "checkpoints" / number).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    return target


def damage(folder: Path) -> None:
    """Flip one bit in the middle of the shard."""
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
