# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on tiny inputs: what they print and write, that their yardsticks are right, that verdicts can fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest
import torch

import bench.measuring as measuring
from bench import host_time, rasterize_cpu, train_profile
from bench.contenders import contenders, difference, measure
from bench.exact_pairs import PairCount, count_view
from bench.measuring import Spread, repeat
from bench.raster_inputs import random_input
from bench.verdicts import Target, format_table
from launch.log_reader import read_log
from masksplat.ops import get_body
from masksplat.types import Splats
from scene.errors import InputError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measuring, "LONGEST_REPEATING_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rasterize_run(tmp_path_factory):
    """Status, printed text and JSON of one tiny run."""
    path = tmp_path_factory.mktemp("bench") / "new" / "raster.json"
    arguments = ["--only", "random", "--random", "300", "--size", "40", "24", "--repeats", "2", "--json", str(path)]
    return arguments, path


def test_rasterize_bench_prints_and_writes(rasterize_run, capsys):
    arguments, path = rasterize_run
    assert rasterize_cpu.main(arguments) == 0
    printed, content = capsys.readouterr().out, json.loads(path.read_text())
    assert "the bodies agree" in printed and "DISAGREE" not in printed
    for target in content["targets"]:
        assert target["verdict"] in ("MET", "MISSED") and target["verdict"] in printed
    assert [target["wanted"] for target in content["targets"]] == [50.0, 400.0, 100.0]
    (case,) = content["inputs"]
    assert [each["contender"] for each in case["measured"]] == ["cpu body", "torch, recomputed", "torch, one graph"]
    pairs = case["pairs"]
    assert (
        0 < pairs["contributing"] < pairs["evaluated"]
        and pairs["contributing"] + pairs["unsampled"] <= (pairs["footprint"])
    )
    for each in case["measured"]:
        assert 0 < each["compositing"]["least"] <= each["compositing"]["median"] <= each["chain"]["largest"]
        assert each["compositing"]["repeats"] == 2
    assert {"date", "processor", "numba_target", "load_before"} <= content["machine"].keys()


def test_speed_up_is_against_the_faster_peer_and_rates_count_pairs_once():
    case = random_input(200, (32, 16))
    comparison = rasterize_cpu.compare(case, contenders(1), repeats=1)
    fastest = min(each.compositing.median for each in comparison.measured[1:])
    assert comparison.speed_up("compositing") == fastest / comparison.ours.compositing.median
    assert math.isclose(comparison.rate("compositing", 10**6), 1.0 / comparison.ours.compositing.median)


def test_disagreeing_bodies_are_noticed():
    case = random_input(200, (32, 16))
    ours, peer = (measure(side, case, 1) for side in contenders(1)[:2])
    assert difference(ours, peer).is_small()
    gradients = peer.result.gradients._replace(scales=1.01 * peer.result.gradients.scales)
    for wrong in (
        peer.result._replace(gradients=gradients),
        peer.result._replace(images=tuple(image + 1e-4 for image in peer.result.images)),
    ):
        assert not difference(ours, type(peer)(**{**vars(peer), "result": wrong})).is_small()


def test_random_input_is_as_described():
    case = random_input(20_000, (200, 150))
    splats = get_body("cpu", num_threads=1).project(case.gaussians, case.views, case.settings, masks=case.masks)
    pairs, _ = count_view(splats, 0, (200, 150))
    assert 40 < pairs.footprint / pairs.num_splats < 60
    assert abs(float((case.masks == 0).float().mean()) - 0.2) < 0.02
    assert torch.equal(case.gaussians.means, random_input(20_000, (200, 150)).gaussians.means)


def _splats(rows) -> Splats:
    count = len(rows)
    index = torch.arange(count)
    boxes = torch.tensor([[0, 0, 3, 1]] * count, dtype=torch.int32)
    offsets = torch.tensor([0, count])
    return Splats(torch.tensor(rows), index.float(), index, index.int(), boxes, offsets, index.int()[None])


def test_exact_count_by_hand():
    """Three pixels in a row; opaque splats over all of them end the pixels, so that the last one finds none alive."""
    wide = [1.5, 0.5, 1e-9, 0.0, 1e-9, 0.95, 1.0, 1.0, 1.0]  # alpha 0.95 everywhere
    narrow = [0.5, 0.5, 1e4, 0.0, 1e4, 0.95, 1.0, 1.0, 1.0]  # only the first pixel
    # T: 0.05, 0.0025, 1.25e-4 (still >= 1e-4), then the fourth ends the pixels and the fifth meets dead ones.
    pairs, light = count_view(_splats([[*wide, 1.0]] * 5), 0, (3, 1))
    assert pairs == PairCount(footprint=15, contributing=9, unsampled=0, num_splats=5)
    assert torch.allclose(light, torch.full((1, 3), 0.05**3, dtype=torch.float64), rtol=1e-6)
    pairs, _ = count_view(_splats([[*narrow, 0.0], [*narrow, 1.0]]), 0, (3, 1))
    assert pairs == PairCount(footprint=2, contributing=1, unsampled=1, num_splats=2)


def test_verdicts():
    assert Target("t", 50, 50, "x").verdict == "MET" and Target("t", 50, 49.9, "x").verdict == "MISSED"
    assert Target("t", 25, 26, "%", at_least=False).verdict == "MISSED"
    assert Target("t", 50, None, "x").verdict == "NOT MEASURED" and "-" in Target("t", 50, None, "x").line()
    assert format_table(["a", "b"], [["long", "1"]]).splitlines() == ["a     b", "----  -", "long  1"]


def test_repetitions_and_spread(monkeypatch):
    assert repeat(iter(range(9)).__next__, 3) == [0, 1, 2]
    monkeypatch.setattr(measuring, "LONGEST_REPEATING_SECONDS", 0.02)
    assert len(repeat(lambda: None, 1)) > 10
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([0.0123, 0.01, 1.5]).milliseconds() == "12.3 (10-1500)"


def test_disturbance_counts_the_work_of_others_only(monkeypatch):
    disturbance = measuring.Disturbance()
    spinning = "import time\nstop = time.monotonic() + 1\nwhile time.monotonic() < stop: pass"
    subprocess.run([sys.executable, "-c", spinning], check=True)
    assert disturbance.cores() > 0.4
    # All that is busy beside our own work is half a core of somebody else's.
    monkeypatch.setattr(measuring, "_busy_seconds", lambda: time.process_time() + 0.5 * time.perf_counter())
    disturbance, stop = measuring.Disturbance(), time.process_time() + 0.05
    while time.process_time() < stop:
        pass
    assert disturbance.cores() == pytest.approx(0.5, abs=0.01)


def test_extra_memory_sees_an_allocation():
    found = measuring.extra_memory(lambda: torch.ones(16 << 20))
    if found is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 60e6 < found < 120e6


def _log(path, *, loss: float) -> None:
    """Two logged moments; seconds of all phases are cumulative, and 0.5 s of 10 lie between the phases."""
    lines = [{"kind": "run"}]
    for iteration, clock in ((100, 10.0), (200, 20.0)):
        share = clock / 10.0
        phases = {"rasterize": 4 * share, "rasterize backward": (5.5 - loss) * share, "loss": loss * share}
        lines.append({"kind": "step", "iteration": iteration, "seconds": clock})
        lines.append({"kind": "phases", "iteration": iteration, "seconds": phases})
    path.write_text("\n".join(json.dumps(line) for line in lines))


@pytest.mark.parametrize(("loss", "verdict"), [(2.4, "MET"), (2.6, "MISSED")])
def test_profile_judges_the_largest_other_phase(tmp_path, capsys, loss, verdict):
    _log(tmp_path / "metrics.jsonl", loss=loss)
    status = train_profile.main(["--log", str(tmp_path), "--json", str(tmp_path / "p.json"), "--strict"])
    assert status == (0 if verdict == "MET" else 1)
    content = json.loads((tmp_path / "p.json").read_text())
    assert [target["verdict"] for target in content["targets"]] == [verdict] * 2
    whole, half = content["profiles"]
    assert (whole["first"], whole["last"], half["first"], half["last"]) == (1, 200, 101, 200)
    assert math.isclose(half["seconds"]["loss"], loss) and math.isclose(half["seconds"]["between phases"], 0.5)
    assert "rasterize *" in capsys.readouterr().out


def test_unnamed_time_is_judged_too(tmp_path):
    _log(tmp_path / "metrics.jsonl", loss=0.0)
    log = read_log(tmp_path / "metrics.jsonl")
    for record in log.phases:
        record["seconds"]["rasterize"] = 0.0
    assert train_profile.profile_of(log).largest_other() == ("between phases", pytest.approx(0.45))


def test_a_log_without_phases_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n')
    with pytest.raises(InputError, match="no phases"):
        train_profile.profile_of(read_log(tmp_path / "metrics.jsonl"))


def test_profile_of_a_training_and_of_its_model(generated_scene, tmp_path, capsys):
    """train.py's own loop from the points; then on from the model that it saved."""
    from train import main as train_main

    arguments = ["--steps", "20", "--json", str(tmp_path / "p.json")]
    assert train_profile.main(["-s", str(generated_scene), *arguments]) == 0
    flags = ["-m", str(tmp_path / "model"), "--iterations", "4", "--quiet", "--no_report"]
    assert not train_main(["-s", str(generated_scene), *flags])
    assert train_profile.main(["-m", str(tmp_path / "model"), *arguments]) == 0
    whole, half = json.loads((tmp_path / "p.json").read_text())["profiles"]
    assert (whole["first"], whole["last"], half["first"], half["last"]) == (5, 24, 15, 24)
    assert {"rasterize", "rasterize backward", "loss", "project", "between phases"} <= whole["seconds"].keys()
    assert min(whole["seconds"].values()) >= 0.0 and math.isclose(sum(whole["seconds"].values()), whole["total"])
    assert capsys.readouterr().out.count("whole step") == 2


def test_host_time_of_every_part_of_a_step(generated_scene, capsys):
    arguments = ["-s", str(generated_scene), "--iterations", "8", "--bsz", "2"]
    assert host_time.main(arguments) == 0
    table = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    rows = {name: numbers for name, numbers in table.items() if numbers and numbers[0] == "4"}
    parts = {"train_step", "masks, draw, update", "of it: launches", "masks: sample", "late numbers: start"}
    assert parts <= rows.keys()
    assert all(float(numbers[-1]) <= float(rows["train_step"][-1]) + 0.01 for numbers in rows.values())
    from train import train_step

    assert train_step.__name__ == "train_step"  # what was replaced is back
