# SPDX-License-Identifier: Apache-2.0
"""Memory that does not suffice: one paragraph with sizes and ways out, and what was trained is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launch.training
import masksplat.cuda.capacity
import train
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator, PeerError
from launch.memory import GpuPeak, bytes_per_gaussian
from launch.run import run_main
from launch.shortage import is_out_of_memory, shortage_text
from launch.start import Start
from launch.world import ending_together
from masksplat.cuda.body import CudaBody
from masksplat.cuda.capacity import Capacity
from masksplat.ops import get_body
from rank_harness import run_ranks
from rank_trajectories import Case, built, run_loop, write_scene
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from scene.model_folder import ModelFolder
from scene.ply import load_ply

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 139.30 GiB memory in use."
)
FLAGS = (
    *("--iterations", "30", "--densify_from_iter", "4", "--densification_interval", "8", "--densify_until_iter", "28"),
    *("--densify_grad_threshold", "1e-5", "--mask_lr", "0.2", "--log_interval", "10", "--threads", "1", "--eval"),
    *("--no-report", "--test_iterations", "-1"),
)


class DriverError(Exception):
    """As cuda.core raises them: of no type that torch or Python knows."""


class FailingBody:
    """The cpu body, one of whose functions raises when it is called for the `number`-th time."""

    def __init__(self, function: str, number: int, error: Exception) -> None:
        self._own, self._function, self._left, self._error = get_body("cpu", num_threads=1), function, number, error

    def __getattr__(self, name: str) -> Any:
        if name != self._function:
            return getattr(self._own, name)

        def called(*values: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise self._error
            return getattr(self._own, name)(*values, **named)

        return called


@pytest.fixture
def fail(
    monkeypatch: pytest.MonkeyPatch, generated_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Train with a body that fails, into tmp_path/m; what stderr says, folded lines joined."""

    def run(body: object, *flags: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(launch.training, "choose_body", lambda *_, **__: body)
            with pytest.raises(SystemExit) as ended:
                run_main(train.main, ["-s", str(generated_scene), "-m", str(tmp_path / "m"), *FLAGS, *flags])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        (paragraph,) = re.findall(r"^error: .*", said, re.DOTALL | re.MULTILINE)
        return " ".join(paragraph.split())

    return run


def test_a_paragraph_names_the_phase_the_sizes_and_three_ways_out(fail: Callable[..., str]) -> None:
    said = fail(FailingBody("rasterize_backward", 5, torch.OutOfMemoryError(CUDA_TEXT)))
    assert said.startswith(
        "error: In the phase 'rasterize backward', memory of the GPU did not suffice: 2.15 GB more were wanted, "
        "0.54 GB of 150.12 GB were free. 60 Gaussians of 736 bytes take 0.00 GB; views have up to 64 x 48 pixels"
    )
    for way in ("(1) smaller photos: --resolution 32", "(2) fewer", "(3) more GPUs", "torchrun", "2e-05 (it is 1e-05)"):
        assert way in said


@pytest.mark.parametrize("function", ["project", "rasterize", "photometric", "rasterize_backward"])
def test_a_step_that_changed_nothing_is_resumed_to_the_same_bits(
    fail: Callable[..., str], generated_scene: Path, tmp_path: Path, function: str
) -> None:
    """Law 6 across an error: in step 19, after two events of densification."""
    said = fail(FailingBody(function, 19, DriverError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed")))
    checkpoint = tmp_path / "m" / "checkpoints" / "18"
    assert f"All that was trained is in {checkpoint}" in said.replace("- ", "-")
    flags = ["-s", str(generated_scene), *FLAGS, "--quiet"]
    assert train.main([*flags, "-m", str(tmp_path / "on"), "--start_checkpoint", str(checkpoint)]) == 0
    assert train.main([*flags, "-m", str(tmp_path / "straight")]) == 0
    one, other = (ModelFolder.open(tmp_path / name).point_cloud(30).read_bytes() for name in ("on", "straight"))
    assert one == other


def test_a_step_that_is_half_done_leaves_the_model(fail: Callable[..., str], tmp_path: Path) -> None:
    said = fail(FailingBody("project_backward_update", 12, MemoryError("Unable to allocate 3.00 MiB for an array")))
    assert "In the phase 'project backward and Adam', memory of the machine did not suffice: 0.00 GB more" in said
    assert "(3) fewer photos in memory: --image_cache_gb 4" in said
    saved = tmp_path / "m" / "point_cloud" / "iteration_11" / "point_cloud.ply"
    assert str(saved) in said and len(load_ply(saved)["means"]) > 60
    assert not (tmp_path / "m" / "checkpoints").exists()


def test_an_edit_that_is_broken_off_leaves_what_was_saved_before(
    fail: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apply = GaussianTable.apply

    def broken(table: GaussianTable, edit: Any) -> None:
        apply(table, edit)
        if table.num_updates == 16:
            table.statistics["view_count"] = table.statistics["view_count"][1:]
            raise torch.OutOfMemoryError(CUDA_TEXT)

    monkeypatch.setattr(GaussianTable, "apply", broken)
    said = fail(get_body("cpu", num_threads=1), "--checkpoint_iterations", "7", "--save_iterations", "5")
    assert "In the phase 'density control'" in said
    assert f"The newest checkpoint is {tmp_path / 'm' / 'checkpoints' / '7'}, the newest saved model" in said
    assert "iteration_5" in said and "All that was trained" not in said and "The model is in" not in said


def test_the_first_step_has_nothing_to_keep(fail: Callable[..., str], tmp_path: Path) -> None:
    said = fail(FailingBody("project", 1, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")))
    assert "In the phase 'project', memory of the machine did not suffice: the machine gives no more" in said
    assert said.endswith("No checkpoint or model has been saved (--checkpoint_iterations).")


def test_more_pairs_than_can_be_sorted(
    fail: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Noticed late, by the status words; the checkpoint is that of the step before."""
    launcher = make_launcher(EMULATED)
    body = CudaBody(launcher=launcher, capacity=Capacity(launcher.device, instances=1 << 12))
    expect = body.capacity.expect

    def expected(num_rows: int) -> None:
        expect(num_rows)
        if num_rows > 60:  # after the first densification, in step 8
            body.capacity.instances = 40
            monkeypatch.setattr(masksplat.cuda.capacity, "MOST_INSTANCES", 50)

    body.capacity.expect = expected  # type: ignore[method-assign]
    said = fail(body)
    assert re.search(r"In the phase 'larger buffers', a view covers \d+ \(splat, tile\) pairs, or more, and 50", said)
    assert "(3) more GPUs" in said and "lists have room for 40 pairs of splat and tile" in said
    assert (tmp_path / "m" / "checkpoints" / "8" / "manifest.json").is_file()


def test_other_errors_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch, generated_scene: Path, tmp_path: Path
) -> None:
    body = FailingBody("rasterize", 3, RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(launch.training, "choose_body", lambda *_, **__: body)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train.main(["-s", str(generated_scene), "-m", str(tmp_path / "m"), *FLAGS, "--quiet"])


def run_out(world: Communicator, source: Path, target: Path) -> str:
    """Memory of rank 1 ends in step 6; what each rank ends with."""
    folder = ModelFolder.create(target)
    training = built(world, source, target, Case("memory", ("--bsz", "3")))
    if world.rank == 1:
        training.body = FailingBody("rasterize", 6, torch.OutOfMemoryError(CUDA_TEXT))  # type: ignore[assignment]
    try:
        with ending_together(world):
            run_loop(training, folder, Start())
    except PeerError as error:
        return f"quiet: {error}"
    except InputError as error:
        world.close()  # what the end of the process does
        return f"said: {error}"
    return "nothing"


def test_one_of_several_ranks_says_it_and_all_end(tmp_path: Path) -> None:
    answers = run_ranks(run_out, 3, write_scene(tmp_path / "scene"), tmp_path / "m")
    assert answers[1].startswith("said: In the phase 'rasterize', memory of the GPU did not suffice: 2.15 GB more")
    assert "on this process, one of 3" in answers[1] and "--nproc-per-node=6" in answers[1]
    assert all(answers[rank].startswith("quiet: rank 1 failed: In the phase 'rasterize'") for rank in (0, 2))


def test_outside_the_loop_there_is_a_paragraph_too(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(_: object) -> int:
        raise torch.OutOfMemoryError(CUDA_TEXT)

    with pytest.raises(SystemExit) as ended:
        run_main(ends, [])
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and said.startswith("error: memory of the GPU did not suffice: 2.15 GB more")
    assert "(3)" in said and "--resolution" in said


def test_which_errors_are_about_memory() -> None:
    assert is_out_of_memory(MemoryError()) and shortage_text(MemoryError()).endswith("the machine gives no more")
    assert not is_out_of_memory(InputError("CUDA error: out of memory was said by another rank"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert shortage_text(caught.value).endswith(f"{(1 << 60) / 1e9:.2f} GB more were wanted")


def test_bytes_of_a_gaussian_are_those_of_its_tensors() -> None:
    for degree, expected in ((3, 736), (0, 736 - 45 * 12)):
        arrays = {spec.name: np.zeros((7, *spec.shape)) for spec in attributes_for(degree)}
        table = GaussianTable.from_arrays(arrays)
        groups = (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
        total = table.ids.nbytes + sum(values.nbytes for group in groups for values in group.values())
        assert bytes_per_gaussian(table) * 7 == total == expected * 7


def test_peaks_are_logged_and_end_the_last_line(
    monkeypatch: pytest.MonkeyPatch, generated_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rising = iter(range(1, 1000))
    monkeypatch.setattr(GpuPeak, "now", classmethod(lambda cls: cls(next(rising) * 10**9, 2 * 10**9)))
    assert train.main(["-s", str(generated_scene), "-m", str(tmp_path / "m"), *FLAGS]) == 0
    records = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["gpu_peak_bytes"] for record in records if record["kind"] == "step"]
    assert steps == [10**9, 2 * 10**9, 3 * 10**9]
    end = records[-1]
    assert (end["gpu_peak_bytes"], end["gpu_peak_reserved_bytes"]) == (4 * 10**9, 2 * 10**9)
    assert records[0]["bytes_per_gaussian"] == 736
    said = capsys.readouterr().out
    assert "at most 4.00 GB of GPU memory at once (2.00 GB held)" in said
    assert said.count("736 bytes") == 1
