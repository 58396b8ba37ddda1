# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 3DGS, MaskGaussian and Grendel-GS become tables, moments included; hostile files run nothing."""

from __future__ import annotations

import collections
import io
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from masksplat.masks import mask_update
from masksplat.types import AdamStep
from predecessor_checkpoints import EXTENT, optimizer_after, raw_parameters, write_checkpoint
from scene import checkpoint_import
from scene.checkpoint_import import import_file, import_grendel_folder
from scene.errors import InputError


def moments(captured: tuple, index: int, kind: str) -> torch.Tensor:
    """A moment of the parameter group at a place of the optimizer."""
    state = captured[-2]
    return state["state"][state["param_groups"][index]["params"][0]][kind]


def test_a_checkpoint_of_3dgs_is_taken_over(tmp_path: Path) -> None:
    captured = write_checkpoint(tmp_path / "chkpnt30.pth", num_rows=7)
    found = import_file(tmp_path / "chkpnt30.pth")
    assert (found.iteration, found.extent, found.notices) == (30, float(EXTENT), ())
    table = found.table
    assert (len(table), table.sh_degree, table.num_updates) == (7, 3, 3)
    for name, place in {"means": 1, "shN": 3, "scales": 4, "quats": 5}.items():
        assert torch.equal(table.params[name], captured[place].detach()), name
    assert torch.equal(table.params["sh0"], captured[2].detach()[:, 0])
    assert torch.equal(table.params["opacities"], captured[6].detach()[:, 0])
    assert bool((table.params["mask_logits"] == 9.0).all())
    assert torch.equal(table.statistics["grad_norm_sum"], captured[-4][:, 0])
    assert torch.equal(table.statistics["view_count"], captured[-3][:, 0])
    for kind, tensors in (("exp_avg", table.exp_avg), ("exp_avg_sq", table.exp_avg_sq)):
        for place, name in enumerate(("means", None, "shN", None, "scales", "quats")):
            if name is not None:
                assert torch.equal(tensors[name], moments(captured, place, kind)), (kind, name)
        assert torch.equal(tensors["sh0"], moments(captured, 1, kind)[:, 0])
        assert torch.equal(tensors["opacities"], moments(captured, 3, kind)[:, 0])
        assert float(tensors["means"].abs().min()) > 0
    assert torch.equal(table.ids, torch.arange(7))


def test_two_mask_logits_become_their_difference_and_go_on_alike(tmp_path: Path) -> None:
    """The imported logit walks on as the difference of MaskGaussian's two logits does under its Adam."""
    captured = write_checkpoint(tmp_path / "chkpnt30.pth", has_masks=True)
    table = import_file(tmp_path / "chkpnt30.pth").table
    two = captured[7].detach()
    assert torch.equal(table.params["mask_logits"], two[:, 0] - two[:, 1])
    parameters = raw_parameters(7)
    theirs = optimizer_after(parameters, 3, has_masks=True)
    gradient = torch.linspace(-1, 1, 7)
    parameters["mask"].grad = torch.stack([gradient, -gradient], dim=1)
    theirs.step()
    mask_update(
        table.params["mask_logits"],
        table.exp_avg["mask_logits"],
        table.exp_avg_sq["mask_logits"],
        d_mask=gradient,
        keep_gradient=torch.ones(7),
        d_all=0.0,
        adam=AdamStep(2e-3, 0.9, 0.999, 1e-15, table.num_updates + 1),
    )
    expected = (parameters["mask"][:, 0] - parameters["mask"][:, 1]).detach()
    assert torch.allclose(table.params["mask_logits"], expected, atol=1e-6, rtol=0)
    assert float((expected - (two[:, 0] - two[:, 1])).abs().max()) > 1e-3


@pytest.mark.parametrize("extent", [np.float64(2.5), np.float32(2.5), 2.5, np.array(2.5)[()]])
def test_the_extent_is_read_whatever_number_it_is(tmp_path: Path, extent: object) -> None:
    captured = write_checkpoint(tmp_path / "a.pth")
    torch.save(((*captured[:-1], extent), 30), tmp_path / "b.pth")
    assert import_file(tmp_path / "b.pth").extent == 2.5


def test_files_of_numpy_1_are_read_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth")
    renamed(tmp_path / "a.pth", tmp_path / "b.pth", b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert import_file(tmp_path / "b.pth").extent == float(EXTENT)


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", num_steps=0)
    table = import_file(tmp_path / "a.pth").table
    assert table.num_updates == 0
    assert all(float(values.abs().max()) == 0 for values in table.exp_avg.values())


def test_moments_of_an_optimizer_that_does_not_count_are_as_old_as_the_run(tmp_path: Path) -> None:
    captured = write_checkpoint(tmp_path / "a.pth", iteration=30)
    for each in captured[-2]["state"].values():
        each["step"] = torch.tensor(0.0)
    torch.save((captured, 30), tmp_path / "b.pth")
    assert import_file(tmp_path / "b.pth").table.num_updates == 30


@pytest.mark.parametrize("has_masks", [False, True])
def test_all_ranks_of_grendel_are_joined(tmp_path: Path, has_masks: bool) -> None:
    parts = [
        write_checkpoint(tmp_path / f"chkpnt_ws=3_rk={rank}.pth", rows, iteration=29, has_masks=has_masks, seed=rank)
        for rank, rows in enumerate((4, 0, 6))
    ]
    found = import_grendel_folder(tmp_path)
    assert found.iteration == 28  # Grendel-GS stores the first image of the next step
    assert torch.equal(found.table.params["means"], torch.cat([part[1].detach() for part in parts]))
    assert torch.equal(found.table.exp_avg["means"], torch.cat([moments(part, 0, "exp_avg") for part in parts]))
    assert torch.equal(found.table.ids, torch.arange(10))
    with pytest.raises(InputError, match="one of 3 parts; give the folder"):
        import_file(tmp_path / "chkpnt_ws=3_rk=0.pth")
    (tmp_path / "chkpnt_ws=3_rk=1.pth").unlink()
    with pytest.raises(InputError, match=r"lacks the files of ranks \[1\] of 3"):
        import_grendel_folder(tmp_path)


def test_files_of_different_runs_are_not_joined(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "chkpnt_ws=2_rk=0.pth", iteration=29)
    write_checkpoint(tmp_path / "chkpnt_ws=2_rk=1.pth", iteration=33)
    with pytest.raises(InputError, match="not of one run"):
        import_grendel_folder(tmp_path)


def test_other_contents_are_refused_by_name(tmp_path: Path) -> None:
    captured = write_checkpoint(tmp_path / "a.pth")
    nan = captured[1].detach().clone()
    nan[2, 1] = float("nan")
    cases = {
        "no checkpoint": {"a": 1},
        "another form": (captured, "many"),
        "holds 11 items": (captured[:11], 30),
        "optimizer has 0 groups": ((*captured[:-2], {"state": {}, "param_groups": []}, 1.0), 30),
        "statistic of 3 rows": ((*captured[:-4], torch.zeros(3, 1), *captured[-3:]), 30),
        "not finite numbers": ((captured[0], nan, *captured[2:]), 30),
        "where a tensor of numbers should be": ((captured[0], "text", *captured[2:]), 30),
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "b.pth")
        with pytest.raises(InputError, match=message) as caught:
            import_file(tmp_path / "b.pth")
        assert "b.pth" in str(caught.value)


def test_every_truncation_is_an_input_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    for length in range(0, len(data), len(data) // 37):
        (tmp_path / "b.pth").write_bytes(data[:length])
        with pytest.raises(InputError, match=r"b\.pth"):
            import_file(tmp_path / "b.pth")


def test_an_older_torch_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a.pth")
    monkeypatch.setattr(checkpoint_import.torch, "__version__", "2.9.1+cu128")
    with pytest.raises(InputError, match=r"torch 2\.10 or newer, and this is 2\.9\.1"):
        import_file(tmp_path / "a.pth")


class Runs:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


HOSTILE = {
    "a shell": lambda canary: Runs(os.system, f"touch {canary}"),
    "a process": lambda canary: Runs(subprocess.call, ["touch", str(canary)]),
    "eval": lambda canary: Runs(eval, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Runs(open, str(canary), "w"),
    "getattr": lambda canary: Runs(getattr, Runs(__import__, "os"), "system"),
    "a path": lambda canary: Runs(Path.touch, canary),
    "numpy": lambda canary: Runs(np.save, str(canary), 1),
    "an array of objects": lambda canary: np.array([Runs(os.system, f"touch {canary}")], dtype=object),
    "a container": lambda canary: collections.OrderedDict(a=[Runs(os.system, f"touch {canary}")]),
    "torch's own": lambda canary: Runs(torch.save, {}, str(canary)),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_hostile_pickles_create_no_canary(
    tmp_path: Path, kind: str, is_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the environment tells torch to load everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    captured = write_checkpoint(tmp_path / "a.pth")
    canary = tmp_path / "canary"
    hostile = ((*captured[:-1], HOSTILE[kind](canary)), 30)
    torch.save(hostile, tmp_path / "b.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match="nothing in it was run"):
        import_file(tmp_path / "b.pth")
    assert not list(tmp_path.glob("canary*"))


def test_the_hostile_files_would_work_elsewhere(tmp_path: Path) -> None:
    """The canaries are real: torch without weights_only makes them."""
    canary = tmp_path / "canary"
    torch.save(HOSTILE["a path"](canary), tmp_path / "b.pth")
    torch.load(tmp_path / "b.pth", weights_only=False)
    assert canary.exists()


def test_a_numpy_value_that_is_no_number_is_refused(tmp_path: Path) -> None:
    captured = write_checkpoint(tmp_path / "a.pth")
    for value in (np.datetime64("2020-01-01"), np.str_("text"), np.void(b"1234")):
        torch.save(((*captured[:-1], value), 30), tmp_path / "b.pth")
        with pytest.raises(InputError, match=r"b\.pth"):
            import_file(tmp_path / "b.pth")


@pytest.mark.parametrize("kind", ["3dgs", "mask", "grendel"])
def test_training_goes_on_from_a_predecessor(any_scene: Path, tmp_path: Path, kind: str) -> None:
    if kind == "grendel":
        place = tmp_path / "theirs"
        for rank in range(2):
            name = f"checkpoints/28/chkpnt_ws=2_rk={rank}.pth"
            write_checkpoint(place / name, 30, iteration=29, seed=rank)
    else:
        place = tmp_path / "chkpnt28.pth"
        write_checkpoint(place, 60, iteration=28, has_masks=kind == "mask")
    flags = ["--iterations", "36", "--bsz", "4", "--quiet", "--no-report", "--log_interval", "4", "--test_iterations"]
    target = tmp_path / "m"
    start = ["--start_checkpoint", str(place)]
    assert train.main(["-s", str(any_scene), "-m", str(target), "--eval", *flags, *start]) == 0
    log = (target / "train.log").read_text()
    assert "Going on behind image 28" in log
    assert "another program's" in log
    assert "60 Gaussians to start with" in log
    assert "the extent" in log  # 4.5 is not this scene's


def test_a_predecessors_step_must_be_ours(any_scene: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "chkpnt30.pth", iteration=30)
    start = ["--start_checkpoint", str(tmp_path / "chkpnt30.pth"), "--quiet", "--bsz", "4"]
    with pytest.raises(InputError, match="behind image 30, which is not a whole number of steps .* give --bsz 1"):
        train.main(["-s", str(any_scene), "-m", str(tmp_path / "m"), *start])


def renamed(source: Path, target: Path, old: bytes, new: bytes) -> None:
    """A copy of a checkpoint with another module name in its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as after:
        for entry in before.infolist():
            data = before.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            after.writestr(entry.filename, data)
    target.write_bytes(buffer.getvalue())
