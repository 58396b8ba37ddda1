# SPDX-License-Identifier: Apache-2.0
"""metrics.py: the numbers, the files 3DGS's scripts read, and what it says when something is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_renderer import lpips
from launch import measure
from launch.measure import Measures, choose_measures, main, measure_model, measure_views
from scene.errors import InputError

REPO = Path(__file__).parent.parent
needs_weights = pytest.mark.skipif(lpips.find_weights() is None, reason="LPIPS weights absent: run `make lpips`")


def write_views(model: Path, split: str, method: str, count: int = 3, first: int = 0) -> list[float]:
    """Write renders that differ from their photos by a constant; return their PSNR, in the order of names."""
    expected = []
    generator = np.random.default_rng(5)
    for index in range(count):
        photo = generator.integers(40, 200, (48, 64, 3), dtype=np.uint8)
        offset = 4 * (index + 1)
        for part, pixels in (("gt", photo), ("renders", photo + np.uint8(offset))):
            path = model / split / method / part / f"{index + first:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        expected.append(20 * np.log10(255 / offset))
    return expected


def test_results_have_the_form_and_the_numbers_of_3dgs(tmp_path: Path) -> None:
    expected = write_views(tmp_path, "test", "ours_7000")
    write_views(tmp_path, "test", "ours_30000", count=1)
    measure_model(tmp_path, progress=False)
    results = json.loads((tmp_path / "results.json").read_text())
    per_view = json.loads((tmp_path / "per_view.json").read_text())
    assert list(results) == ["ours_7000", "ours_30000"]
    assert results["ours_7000"]["PSNR"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert results["ours_7000"]["protocol"] == "3dgs"
    assert list(per_view["ours_7000"]["PSNR"]) == ["00000.png", "00001.png", "00002.png"]
    assert list(per_view["ours_7000"]["PSNR"].values()) == pytest.approx(expected, abs=1e-9)
    assert set(per_view["ours_7000"]) == {"SSIM", "PSNR"}
    ssims = list(per_view["ours_7000"]["SSIM"].values())
    assert results["ours_7000"]["SSIM"] == pytest.approx(np.mean(ssims), abs=1e-12)
    assert 1 > ssims[0] > ssims[1] > ssims[2] > 0.8


def test_train_mode_has_files_of_its_own(tmp_path: Path) -> None:
    write_views(tmp_path, "train", "ours_10", count=2, first=1)
    assert main(["-m", str(tmp_path), "--mode", "train", "--lpips", "none", "--quiet"]) == 0
    assert not (tmp_path / "results.json").exists()
    assert list(json.loads((tmp_path / "per_view_train.json").read_text())["ours_10"]["PSNR"]) == [
        "00001.png",
        "00002.png",
    ]


@needs_weights
def test_lpips_of_the_two_networks_never_share_a_name(tmp_path: Path) -> None:
    write_views(tmp_path, "test", "ours_1", count=1)
    by_alex = measure_model(tmp_path, measures=choose_measures("alex"), progress=False)["ours_1"]
    by_vgg = measure_model(tmp_path, measures=choose_measures("auto"), progress=False)["ours_1"]
    assert "LPIPS" not in by_alex
    assert 0 < by_alex["LPIPS_alex"] < 0.3
    assert "LPIPS_alex" not in by_vgg
    assert 0 < by_vgg["LPIPS"] < 0.3


def test_without_weights_lpips_is_left_out_and_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lpips, "PACKAGE", "no_such_package_as_this")
    write_views(tmp_path, "test", "ours_1", count=1)
    assert main(["-m", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("make lpips") == 1
    assert "LPIPS" not in json.loads((tmp_path / "results.json").read_text())["ours_1"]
    with pytest.raises(InputError, match="--lpips alex.*make lpips"):
        choose_measures("alex")


def test_several_models_one_of_them_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "third"):
        write_views(tmp_path / name, "test", "ours_1", count=1)
    paths = [str(tmp_path / name) for name in ("first", "second", "third")]
    assert main(["--model_paths", *paths, "--lpips", "none"]) == 2
    captured = capsys.readouterr()
    assert "second does not exist" in captured.err
    assert all((tmp_path / name / "results.json").exists() for name in ("first", "third"))
    assert captured.out.count("PSNR") == 2


def _drop_a_photo(model: Path) -> None:
    (model / "test/ours_1/gt/00001.png").unlink()


def _drop_all_photos(model: Path) -> None:
    for path in (model / "test/ours_1/gt").iterdir():
        path.unlink()


def _cut_a_render(model: Path) -> None:
    path = model / "test/ours_1/renders/00000.png"
    path.write_bytes(path.read_bytes()[:200])


def _shrink_a_render(model: Path) -> None:
    Image.new("RGB", (64, 47)).save(model / "test/ours_1/renders/00000.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_a_photo, "has 3 images and .*gt has 2; 00001.png is in only one"),
        (_drop_all_photos, "no PNG images in .*gt"),
        (_cut_a_render, "renders/00000.png cannot be read"),
        (_shrink_a_render, "differ in size: 64x47 and 64x48"),
    ],
)
def test_renders_that_do_not_fit_their_photos_are_refused(tmp_path: Path, damage, message: str) -> None:
    write_views(tmp_path, "test", "ours_1")
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        measure_model(tmp_path, progress=False)
    assert not (tmp_path / "results.json").exists()


def test_nothing_rendered_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="render.py -m .* --skip_train .*--eval"):
        measure_model(tmp_path)


def test_the_script_itself_fails_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "metrics.py"), "-m", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "nothing does not exist" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("network", ["none", pytest.param("auto", marks=needs_weights)])
def test_any_number_of_threads_measures_the_same(tmp_path: Path, network: str) -> None:
    write_views(tmp_path, "test", "ours_1", count=5)
    measures, threads_before = choose_measures(network), torch.get_num_threads()
    alone = measure_views(tmp_path / "test/ours_1", measures, threads=1, progress=False)
    together = measure_views(tmp_path / "test/ours_1", measures, threads=3, progress=False)
    assert list(together) == [f"{index:05d}.png" for index in range(5)] and together == alone
    assert torch.get_num_threads() == threads_before


class _Recorder(Measures):
    """Notes which threads measure, and how many torch would use there; waits for the others, so that all are seen."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        object.__setattr__(self, "seen", {})
        object.__setattr__(self, "barrier", threading.Barrier(parties, timeout=60))

    def of(self, render: torch.Tensor, photo: torch.Tensor) -> dict[str, float]:
        self.seen[threading.get_ident()] = torch.get_num_threads()
        self.barrier.wait()
        return super().of(render, photo)


@pytest.mark.parametrize(
    ("threads", "count", "memory", "expected"), [(2, 4, 2**40, [1, 1]), (6, 2, 2**40, [3, 3]), (4, 2, 1, [4])]
)
def test_threads_measure_views_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, count: int, memory: int, expected: list[int]
) -> None:
    """Sharing the operations of one view is for threads that have no view: torch's threads spin, also on busy cores."""
    monkeypatch.setattr(measure, "available_memory", lambda: memory)
    write_views(tmp_path, "test", "ours_1", count=count)
    recorder = _Recorder(len(expected))
    measure_views(tmp_path / "test/ours_1", recorder, threads=threads, progress=False)
    assert list(recorder.seen.values()) == expected


def test_as_many_views_at_once_as_half_the_memory_holds() -> None:
    a_view = measure.BYTES_PER_PIXEL * 1000
    assert measure.views_at_once(8, 100, 1000, 16 * a_view) == 8
    assert measure.views_at_once(8, 100, 1000, 16 * a_view - 1) == 7
    assert measure.views_at_once(8, 3, 1000, 100 * a_view) == 3
    assert measure.views_at_once(8, 0, 1000, 0) == 1


def test_training_views_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        write_views(tmp_path, split, "ours_10", count=1)
        assert main(["-m", str(tmp_path), "--mode", split, "--lpips", "none"]) == 0
        shown = capsys.readouterr().out
        assert ("Training views" in shown) == (split == "train") and "PSNR" in shown
