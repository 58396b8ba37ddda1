# SPDX-License-Identifier: Apache-2.0
"""Suites of runs: what is run, in which order, on what; what is not run again; and the table of the results."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import launch.children
from launch.cli import parse_train
from launch.protocols import METHODS, PROTOCOLS, USUAL_METHODS, methods_of, scenes_of
from launch.run_all import Schedule, main, parse
from launch.run_results import Result
from launch.run_table import COLUMNS, html_of, markdown_of, rows_of
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from scene.model_folder import ModelFolder
from scene.ply import save_ply


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("fox", "garden"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


class Process:
    """What subprocess.Popen returns, as far as it is used."""

    def __init__(self, wait: Callable[[], int], terminate: Callable[[], None] = lambda: None) -> None:
        self.wait, self.terminate = wait, terminate


class StandIn:
    """In place of subprocess: writes what our programs leave, and remembers how it was called."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.lock = failing, threading.Lock()
        self.calls: list[list[str]] = []
        self.trained: list[tuple[str, str]] = []  # folder's name and GPU, as they began
        self.busy: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def Popen(self, command: Sequence[str], env: Mapping[str, str], stdout: Any, **_: object) -> object:
        gpu, is_training = env["CUDA_VISIBLE_DEVICES"], command[1].endswith("train.py")
        model = Path(command[3] if command[1] == "-m" else command[command.index("-m") + 1])
        with self.lock:
            self.calls.append(list(command))
            self.busy[gpu] = self.busy.get(gpu, 0) + 1
            self.most[gpu] = max(self.most.get(gpu, 0), self.busy[gpu])
            if is_training:
                self.trained.append((f"{model.parent.name}/{model.name}", gpu))

        def wait() -> int:
            threading.Event().wait(0.02)
            status = 0
            if is_training and self.failing and self.failing in str(model):
                stdout.write(b"much\nerror: it does not\nwork\n")
                status = 2
            elif is_training:
                self._train(command, model)
            elif command[1].endswith("metrics.py"):
                self._measure(model)
            elif command[2] == "launch.frame_rate":
                rate = {"frames_per_second": 50.0, "device": "cpu"}
                (model / "frame_rate.json").write_text(json.dumps(rate))
            with self.lock:
                self.busy[gpu] -= 1
            return status

        return Process(wait)

    def _train(self, command: Sequence[str], model: Path) -> None:
        config = parse_train(command[2:])
        last, seed = config.optimization.iterations, config.optimization.seed
        if config.prune.start_pointcloud:
            assert Path(config.prune.start_pointcloud).is_file(), "the base is trained first"
        count = 4 if model.name.startswith("3dgs") else 2
        arrays = {spec.name: np.zeros((count, *spec.shape), np.float32) for spec in attributes_for(0)}
        ply = model / "point_cloud" / f"iteration_{last}" / "point_cloud.ply"
        ply.parent.mkdir(parents=True, exist_ok=True)
        save_ply(ply, GaussianTable.from_arrays(arrays).params)
        (model / "cfg_args").write_text("Namespace(sh_degree=0)")
        self._measure(model, seed)
        lines = [
            {"kind": "saved", "iteration": last, "num_gaussians": count},
            {"kind": "end", "seconds": 12.0, "peak_memory_bytes": 3e9, "gpu_peak_bytes": 0},
        ]
        (model / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _measure(self, model: Path, seed: int = 0) -> None:
        measures = {"PSNR": 30.0 + seed, "SSIM": 0.9, "LPIPS": None}
        last = ModelFolder(model).find_iteration()
        (model / "results.json").write_text(json.dumps({f"ours_{last}": measures}))

    def programs(self, folder: str) -> list[str]:
        """The names of the programs that were run for a model folder, in this order."""
        calls = [call for call in self.calls if any(word.endswith(folder) for word in call)]
        return [call[2] if call[1] == "-m" else Path(call[1]).name for call in calls]


def stand_in(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> StandIn:
    made = StandIn(failing)
    monkeypatch.setattr(launch.children, "subprocess", made)
    return made


def test_every_scene_with_every_method_and_seed_and_one_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = stand_in(monkeypatch), tmp_path / "out"
    own = [
        "--data",
        str(data / "fox"),
        str(data / "garden"),
        "-o",
        str(out),
        "--methods",
        "post",
        "beta",
        "--gpus",
        "4",
    ]
    own += ["7", "--seeds", "0", "2", "--add", "small", "--target_mb 3 --bsz 2"]
    flags = ["--", "--iterations", "700", "--scale_schedules"]
    assert main([*own, *flags]) == 0
    expected = {
        f"{scene}/{method}-{seed}"
        for scene in ("fox", "garden")
        for method in ("3dgs", "post", "beta", "small")
        for seed in (0, 2)
    }
    assert {name for name, _ in made.trained} == expected and len(made.trained) == len(expected)
    assert {gpu for _, gpu in made.trained} == {"4", "7"} and made.most == {"4": 1, "7": 1}
    small = next(call for call in made.calls if "small-2" in " ".join(call) and "train.py" in call[1])
    config = parse_train(small[2:])
    assert (config.prune.target_mb, config.optimization.bsz, config.optimization.seed) == (3.0, 2, 2)
    assert config.model.eval and config.prune.scale_schedules and config.logging.render_and_evaluate
    post = parse_train(
        next(call for call in made.calls if "fox/post-2" in " ".join(call) and "train.py" in call[1])[2:]
    )
    assert post.prune.start_pointcloud == str(out / "fox/3dgs-2/point_cloud/iteration_700/point_cloud.ply")
    assert post.optimization.iterations == 35_000 and not post.prune.scale_schedules
    table = json.loads((out / "table.json").read_text())
    assert len(table["runs"]) == 16 and len(table["rows"]) == 12 and table["failures"] == {}
    assert "| fox | beta | 31.00 ± 1.41 | 0.9000 ± 0.0000 |  | 2 ± 0 |" in (out / "table.md").read_text()
    assert "<td>31.00 ± 1.41</td>" in (out / "table.html").read_text()
    count = len(made.calls)
    assert main([*own, *flags]) == 0 and len(made.calls) == count, "nothing is run twice"
    assert main([*own, "--seeds", "0", "2", "3", *flags]) == 0
    assert {name[-1] for name, _ in made.trained[16:]} == {"3"}
    with pytest.raises(InputError, match="fox/3dgs-0 holds a run of other flags or data"):
        main([*own, "--", "--iterations", "800"])


def test_a_run_goes_on_only_with_the_flags_it_was_started_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its flags nor those of its base may change once there is a checkpoint; before that, it begins anew."""
    made, out = stand_in(monkeypatch, failing="beta"), tmp_path / "out"

    def call(method: str, iterations: int, *flags: str) -> int:
        own = ["--data", str(data / "fox"), "-o", str(out), "--methods", method, "--gpus"]
        return main([*own, "--", "--iterations", str(iterations), *flags])

    assert call("beta", 700, "--lambda_mask", "0.5") == 1
    made.failing = ""
    assert call("beta", 700, "--lambda_mask", "0.25", "--no_report") == 0, "there was nothing to lose"
    notice = f"{out}/fox/beta-0 is begun anew (--lambda_mask was 0.5 and is 0.25)"
    assert notice in capsys.readouterr().out

    folder, count = out / "fox" / "beta-0", len(made.calls)
    for path in (folder / "run.json", folder / "results.json", folder / "metrics.jsonl"):
        path.unlink()
    shutil.rmtree(folder / "point_cloud")
    (folder / "checkpoints" / "300").mkdir(parents=True)
    with pytest.raises(InputError, match=r"fox/beta-0 holds a run of other flags .* --lambda_mask was 0.25 and is 0.5"):
        call("beta", 700, "--lambda_mask", "0.5")
    assert len(made.calls) == count, "nothing has been started"
    assert call("beta", 700, "--lambda_mask", "0.25") == 0 and made.trained[-1][0] == "fox/beta-0"

    assert call("post", 700) == 0
    shutil.rmtree(out / "fox" / "3dgs-0")
    with pytest.raises(InputError, match="fox/post-0 .* of the model it starts from, --iterations was 700 and is 800"):
        call("post", 800)


def test_the_table_has_every_finished_run_of_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    out = tmp_path / "out"
    command = ["--data", str(data / "fox"), "-o", str(out), "--gpus"]
    assert main([*command, "--methods", "3dgs", "beta", "--seeds", "0", "1", "--", "--iterations", "700"]) == 0
    shutil.copytree(out / "fox" / "beta-1", out / "fox" / "beta-1-copy")
    assert main([*command, "--methods", "3dgs", "--", "--iterations", "700"]) == 0
    garden = ["--data", str(data / "garden"), "-o", str(out), "--gpus", "--methods", "beta"]
    assert main([*garden, "--", "--iterations", "800"]) == 0
    table = json.loads((out / "table.json").read_text())
    rows = [(row["scene"], row["method"], row["num_seeds"]) for row in table["rows"]]
    assert rows == [("fox", "3dgs", 2), ("fox", "beta", 2), ("garden", "beta", 1), ("mean", "beta", 1)]
    told = "--iterations 700: fox/3dgs-0, fox/3dgs-1, fox/beta-0, fox/beta-1; --iterations 800: garden/beta-0."
    assert f"Not all runs were given the same flags for all: {told}" in (out / "table.md").read_text()
    assert told in (out / "table.html").read_text()
    (out / "fox" / "beta-1" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"beta-1/run\.json cannot be read"):
        main([*garden, "--", "--iterations", "800"])


@pytest.mark.parametrize(
    ("missing", "programs"),
    [
        ([], []),
        (["run.json"], ["launch.frame_rate"]),
        (["run.json", "results.json"], ["render.py", "metrics.py", "launch.report", "launch.frame_rate"]),
        (["run.json", "metrics.jsonl"], ["train.py", "launch.frame_rate"]),
        (["run.json", "point_cloud"], ["train.py", "launch.frame_rate"]),
    ],
)
def test_what_has_ended_is_not_done_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], programs: list[str]
) -> None:
    stand_in(monkeypatch)
    command = ["--data", str(data / "fox"), "-o", str(tmp_path / "out"), "--methods", "beta", "--gpus"]
    assert main(command) == 0
    folder = tmp_path / "out" / "fox" / "beta-0"
    for name in missing:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = stand_in(monkeypatch)
    assert main(command) == 0 and made.programs("fox/beta-0") == programs
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["runs"]) == 1


def test_finished_runs_of_earlier_versions_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their run.json has neither the base's flags nor those of the suite, and there is no started.json."""
    made = stand_in(monkeypatch)
    command = ["--data", str(data / "fox"), "-o", str(tmp_path / "out"), "--methods", "post", "--gpus"]
    assert main(command) == 0
    count = len(made.calls)
    for folder in (tmp_path / "out" / "fox").iterdir():
        (folder / "started.json").unlink()
        kept = json.loads((folder / "run.json").read_text())
        kept.pop("base", None)
        kept["result"].pop("common_flags")
        (folder / "run.json").write_text(json.dumps(kept))
    assert main(command) == 0 and len(made.calls) == count
    with pytest.raises(InputError, match=r"fox/3dgs-0 holds a run of other flags or data: --bsz was 1 and is 2\."):
        main([*command, "--", "--bsz", "2"])


def test_no_report_is_made_afterwards_of_a_run_without(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    command = ["--data", str(data / "fox"), "-o", str(tmp_path), "--methods", "post", "--gpus", "--", "--no_report"]
    assert main(command) == 0
    for name in ("run.json", "results.json"):
        (tmp_path / "fox" / "post-0" / name).unlink()
    made = stand_in(monkeypatch)
    assert main(command) == 0 and made.programs("fox/post-0") == ["render.py", "metrics.py", "launch.frame_rate"]


def test_an_added_method_finetunes_the_model_of_3dgs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = stand_in(monkeypatch), tmp_path / "out"
    added = ["--add", "postrad", "--prune_finetune --prune_method rad_splat --prune_percent 0.6 --iterations 33000"]
    command = ["--data", str(data / "fox"), "-o", str(out), "--methods", "beta", *added, "--gpus"]
    assert main([*command, "--", "--iterations", "700", "--scale_schedules"]) == 0
    assert [name for name, _ in made.trained] == ["fox/3dgs-0", "fox/beta-0", "fox/postrad-0"]
    call = next(call for call in made.calls if "fox/postrad-0" in " ".join(call) and "train.py" in call[1])
    config = parse_train(call[2:])
    assert config.prune.start_pointcloud == str(out / "fox/3dgs-0/point_cloud/iteration_700/point_cloud.ply")
    assert config.optimization.iterations == 33_000, "its own length wins over --post_iterations"
    assert config.prune.prune_use_percent_iterations == (30_001,) and config.notices == ()


def test_which_added_methods_have_a_base() -> None:
    flags = {
        "short": "--prune_fine",
        "none": "--prune_finetune --no_prune_finetune",
        "own": "--prune_finetune --start_pointcloud a.ply",
        "saved": "--prune_finetune --start_checkpoint a.pth",
    }
    found = {method.name: method.base for method in methods_of((), tuple(flags.items()))}
    assert found == {"3dgs": "", "short": "3dgs", "none": "", "own": "", "saved": ""}
    with pytest.raises(InputError, match=r"--add mine: .*--prune_finetoon.* Did you mean --prune_finetune\?"):
        methods_of((), (("mine", "--prune_finetoon"),))
    with pytest.raises(InputError, match="--add mine: No closing quotation"):
        methods_of((), (("mine", "'--bsz"),))


def test_compact_3dgs_has_its_own_values_on_nerf_synthetic(data: Path, tmp_path: Path) -> None:
    (data / "lego").mkdir()
    (data / "truck").mkdir()
    command = ["--data", str(data), "-o", str(tmp_path), "--protocol", "nerf_synthetic", "tanks_and_temples"]
    command += ["--scenes", "lego", "truck", "--methods", "compact_3dgs", "beta", "--gpus"]

    def values(*flags: str) -> dict[tuple[str, str], tuple[float, float]]:
        configs = {run: parse_train([*run.flags, "-s", "data"]).mask for run in parse([*command, *flags]).runs}
        return {(run.scene.name, run.method.name): (mask.lambda_mask, mask.mask_lr) for run, mask in configs.items()}

    usual = (5e-4, 0.01)
    assert values() == {
        ("lego", "compact_3dgs"): (4e-3, 1e-3),
        ("lego", "beta"): usual,
        ("truck", "compact_3dgs"): usual,
        ("truck", "beta"): usual,
    }
    assert values("--", "--lambda_mask", "0.002")[("lego", "compact_3dgs")] == (0.002, 1e-3), "what is given wins"


def test_a_failure_stops_what_starts_from_it_and_nothing_else(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = stand_in(monkeypatch, failing="fox/3dgs"), tmp_path / "out"
    command = ["--data", str(data / "fox"), str(data / "garden"), "-o", str(out), "--methods", "3dgs", "post", "beta"]
    assert main([*command, "--gpus", "--jobs", "3"]) == 1
    assert {name for name, _ in made.trained} == {"fox/3dgs-0", "fox/beta-0"} | {
        f"garden/{method}-0" for method in ("3dgs", "post", "beta")
    }
    printed = capsys.readouterr().out
    assert "fox/3dgs-0: status 2: error: it does not work" in printed
    assert f"fox/post-0: {out / 'fox/3dgs-0'}, which it starts from, failed" in printed
    assert (out / "fox/3dgs-0/console.log").read_text().endswith("error: it does not\nwork\n")
    stand_in(monkeypatch)
    assert main([*command, "--gpus"]) == 0, "what failed is tried again"
    assert len(json.loads((out / "table.json").read_text())["runs"]) == 6


def test_an_interruption_ends_what_is_running(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), threading.Event()

    def start(command: Sequence[str], **_: object) -> object:
        started.set()
        return Process(lambda: 143 if ended.wait(20) else 0, ended.set)

    def interrupt(*_: object, **__: object) -> object:
        assert started.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.children, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(launch.children, "wait", interrupt)
    (tmp_path / "out").mkdir()
    schedule = Schedule(parse(["--data", str(data / "fox"), "-o", str(tmp_path / "out"), "--gpus"]))
    with pytest.raises(KeyboardInterrupt):
        schedule.run()
    assert ended.is_set() and schedule.failures == {} and schedule.results == []


def test_a_defect_in_a_worker_is_not_swallowed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: Sequence[str], **_: object) -> object:
        raise RuntimeError("a defect")

    monkeypatch.setattr(launch.children, "subprocess", SimpleNamespace(Popen=start))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["--data", str(data / "fox"), "-o", str(tmp_path / "out"), "--gpus", "--jobs", "2"])


def test_protocols_are_those_of_the_papers(tmp_path: Path) -> None:
    assert [len(scenes) for scenes in PROTOCOLS.values()] == [9, 2, 2, 8]
    for scenes in PROTOCOLS.values():
        for name in scenes:
            (tmp_path / name).mkdir()
    found = {scene.name: scene for scene in scenes_of(tuple(PROTOCOLS), tmp_path, ())}
    configs = {name: parse_train(["-s", str(scene.source), *scene.flags]) for name, scene in found.items()}
    assert len(configs) == 21 and all(config.model.eval for config in configs.values())
    images = {name: config.model.images for name, config in configs.items()}
    assert {name for name, folder in images.items() if folder == "images_4"} == {
        *("bicycle", "flowers", "garden", "stump", "treehill")
    }
    assert {name for name, folder in images.items() if folder == "images_2"} == {"room", "counter", "kitchen", "bonsai"}
    assert {name for name, config in configs.items() if config.model.white_background} == set(
        PROTOCOLS["nerf_synthetic"]
    )
    assert [scene.name for scene in scenes_of(("deep_blending",), tmp_path, ("playroom",))] == ["playroom"]
    with pytest.raises(InputError, match="lego is not a scene of deep_blending"):
        scenes_of(("deep_blending",), tmp_path, ("lego",))
    with pytest.raises(InputError, match="there is no folder .*drjohnson"):
        scenes_of(("deep_blending",), tmp_path / "x", ())


def test_methods_are_valid_trainings() -> None:
    for method in METHODS.values():
        start = ["--start_pointcloud", "a.ply", "--iterations", "35000"] if method.base else []
        config = parse_train(["-s", "data", *method.flags, *start])
        assert config.notices == (), method.name
    assert [method.name for method in methods_of(("post", "gamma"), ())] == ["3dgs", "post", "gamma"]
    with pytest.raises(InputError, match="delta is unknown"):
        methods_of(("delta",), ())
    with pytest.raises(InputError, match="this method exists"):
        methods_of(USUAL_METHODS, (("post", ""),))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--jobs", "0"), "--jobs and --post_iterations are 1 or more"),
        (("--protocol", "deep_blending"), "--data is the one folder"),
        (("--data", "data/fox", "other/fox"), "several data sets are called fox"),
        (("--data", "data/wolf"), "there is no folder"),
    ],
)
def test_impossible_suites_are_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(data.parent)
    with pytest.raises(InputError, match=sentence):
        parse(["--data", "data/fox", "data/garden", "-o", "out", *flags])


def result(scene: str, method: str, psnr: float, count: int, seed: int = 0, lpips: float | None = 0.1) -> Result:
    return Result("p", scene, method, seed, psnr, 0.9, lpips, count, 62 * 4 * count, 60.0, 10**9, 100.0, "<chip>")


def test_rows_compare_with_the_scene_unpruned_and_means_need_every_scene() -> None:
    results = [
        *(result("b", "beta", 29.9, 400), result("b", "3dgs", 30.0, 1000), result("a", "3dgs", 20.0, 2000)),
        *(result("a", "beta", 20.3, 1000, lpips=None), result("a", "mine", 19.0, 100)),
    ]
    rows = rows_of(results)
    names = [
        ("a", "3dgs"),
        ("a", "beta"),
        ("a", "mine"),
        ("b", "3dgs"),
        ("b", "beta"),
        ("mean", "3dgs"),
        ("mean", "beta"),
    ]
    assert [(row.scene, row.method) for row in rows] == names
    text = markdown_of(results, {"/x": "broken"})
    assert "| p: a | beta | 20.30 | 0.9000 |  | 1,000 | 0.2 | 60 | 1.00 | 100.0 | 50.0 % | +0.30 | 1 |" in text
    assert "| p: mean | beta | 25.10 | 0.9000 |  | 700 | 0.2 | 60 | 1.00 | 100.0 | 53.3 % | +0.10 | 1 |" in text
    assert "- /x: broken" in text and len(COLUMNS) == 8
    page = html_of(results, {"/x": "<broken>"})
    assert page.count("<tr") == 1 + len(rows) and "&lt;broken&gt;" in page and "<chip>" not in page


@pytest.mark.slow
def test_a_suite_for_real(tiny_fox: Path, tmp_path: Path) -> None:
    """Two runs at once on the CPU, two more from the first's model, and the frame rate of all."""
    command = ["--data", str(tiny_fox), "-o", str(tmp_path), "--methods", "beta", "post", "--jobs", "2", "--gpus"]
    command += ["--add", "postrad", "--prune_finetune --prune_method rad_splat --prune_percent 0.6"]
    flags = ["--", "--iterations", "40", "--no_report"]
    assert main([*command, "--post_iterations", "20", *flags]) == 0
    rows = {row["method"]: row["measures"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert set(rows) == {"3dgs", "beta", "post", "postrad"}
    for measures in rows.values():
        assert (
            measures["FPS"]["mean"] > 1 and measures["PSNR (dB)"]["mean"] > 5 and measures["peak (GB)"]["mean"] > 0.05
        )
    assert rows["post"]["PSNR (dB)"]["mean"] > rows["3dgs"]["PSNR (dB)"]["mean"]
    assert rows["postrad"]["Gaussians"]["mean"] == pytest.approx(0.4 * rows["3dgs"]["Gaussians"]["mean"], abs=1)
