# SPDX-License-Identifier: Apache-2.0
"""report.html: it says what the model folder says, it is one valid file that asks nobody for anything, and it works."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.log_reader import read_log
from launch.report import main, pruned_by, write_report
from launch.report_charts import build_charts, heat_map, smooth, thin
from launch.report_splats import ViewerCamera, mean_colors, pack_model, up_direction
from launch.report_views import choose_pictured, difference_image
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import save_ply

NUM_SPLATS = 400
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_params(count: int = NUM_SPLATS, seed: int = 3) -> dict[str, np.ndarray]:
    """Raw parameters of splats around the origin, one of them a thousand times farther than the others."""
    generator = np.random.default_rng(seed)
    means = generator.normal(0, 1, (count, 3))
    means[7] *= 1000
    params = {
        "means": means,
        "sh0": generator.normal(0, 0.5, (count, 3)),
        "shN": generator.normal(0, 0.1, (count, 3, 3)),
        "opacities": generator.normal(1, 2, count),
        "scales": generator.normal(-2, 0.7, (count, 3)),
        "quats": generator.normal(0, 1, (count, 4)),
    }
    return {name: values.astype(np.float32) for name, values in params.items()}


def make_cameras(count: int = 5) -> list[dict]:
    """Cameras.json entries on a ring of radius 5 that look at the origin, y down."""
    entries = []
    for index in range(count):
        angle = 2 * np.pi * index / count
        sine, cosine = float(np.sin(angle)), float(np.cos(angle))
        rotation = [[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]]  # columns: right, down, forward
        position = [-5 * sine, 0.0, -5 * cosine]
        entries.append(
            {"id": index, "img_name": f"photo{index}", "width": 64, "height": 48, "position": position,
             "rotation": rotation, "fy": 60.0, "fx": 60.0}
        )  # fmt: skip
    return entries


def make_records(iterations: int = 1000) -> list[dict]:
    """The lines of a metrics.jsonl."""
    records: list[dict] = [{"kind": "run", "scene": {"num_test": 2, "num_train": 3}}]
    for iteration in range(100, iterations + 1, 100):
        if iteration in (600, 800):
            records.append(
                {"kind": "edit", "iteration": iteration, "cloned": 30, "split": 20, "pruned_opacity": 3,
                 "pruned_mask": 11, "pruned_size": 2, "num_gaussians": 500}
            )  # fmt: skip
        records.append(
            {"kind": "step", "iteration": iteration, "loss": 0.2 - iteration / 1e4, "l1": 0.1, "ssim": 0.8,
             "num_gaussians": 300 + iteration // 10, "expected_gaussians": 250.5, "images_per_second": 3.0,
             "memory_bytes": 300 << 20, "seconds": iteration / 50}
        )  # fmt: skip
        counts = [5] * 19 + [iteration]
        records.append({"kind": "mask_histogram", "iteration": iteration, "counts": counts})
    records += [
        {"kind": "evaluation", "iteration": 1000, "split": "test", "psnr": 27.654, "ssim": 0.8, "l1": 0.1},
        {"kind": "phases", "iteration": 1000, "seconds": {"project": 4.0, "rasterize": 12.0}},
        {"kind": "saved", "iteration": 1000, "path": "x", "num_gaussians": NUM_SPLATS},
        {"kind": "end", "seconds": 75.0, "images_per_second": 13.3, "peak_memory_bytes": 3 << 29},
    ]
    return records


def write_log(path: Path, records: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with everything in it; names try to break out of the HTML."""
    folder = ModelFolder.create(tmp_path / "model")
    write_log(folder.metrics, make_records())
    groups = {
        "model": {"source_path": "/data/garden <b>&", "white_background": False},
        "optimization": {"iterations": 1000, "lambda_dssim": 0.2},
        "viewer": {"port": 6009},
        "given": ["iterations"],
    }
    folder.write_config(groups, ["train.py", "-s", "/data/garden <b>&", "--iterations", "1000"])
    cameras = make_cameras()
    cameras[0]["img_name"] = "</script><script>alert(1)</script>"
    folder.cameras.write_text(json.dumps(cameras))
    save_ply(folder.point_cloud(1000), {name: torch.from_numpy(v) for name, v in make_params().items()})
    generator = np.random.default_rng(0)
    for index in range(2):
        for place in (folder.renders("test", 1000), folder.ground_truth("test", 1000)):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(place / f"{index:05d}.png")
    means = {"SSIM": 0.91234, "PSNR": 31.2345, "LPIPS": 0.1234, "protocol": "3dgs"}
    folder.results("test").write_text(json.dumps({"ours_1000": means}))
    per_view = {"PSNR": {"00000.png": 30.01, "00001.png": 32.46}, "SSIM": {"00000.png": 0.9, "00001.png": 0.92468},
                "LPIPS": {"00000.png": 0.13, "00001.png": 0.1168}}  # fmt: skip
    folder.per_view("test").write_text(json.dumps({"ours_1000": per_view}))
    return folder.path


class _Page(HTMLParser):
    """Collects what the tests look at, and checks that elements close in the order they opened."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: dict[str, str] = {}
        self.cards: dict[str, str] = {}
        self.text = ""
        self._script, self._card = "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID and tag not in {"path", "circle", "ellipse"}:
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [str(values[name]) for name in ("src", "href", "action", "data") if values.get(name)]
        if tag == "script":
            self._script = values.get("id") or "code"
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"path", "circle", "ellipse"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] += data
        elif self.open and self.open[-1] != "style":
            self.text += data
            if self.open[-1] == "h3":
                self._card = data
            elif self._card and data.strip() and "section" in self.open:
                self.cards.setdefault(self._card, "")
                self.cards[self._card] += data.strip() + " "


def parse(path: Path) -> tuple[_Page, dict]:
    page = _Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.scripts["report-data"])


def test_the_page_is_valid_and_alone(model: Path) -> None:
    path = write_report(model)
    page, _ = parse(path)
    assert path == model / "report.html"
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    outside = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", re.sub(r"base64,[\w+/=]+", "", text)))
    assert {url for url in outside if not url.startswith("http://www.w3.org/2000/svg")} == set()
    assert "{{" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_names_cannot_break_out_of_the_page(model: Path) -> None:
    path = write_report(model)
    page, data = parse(path)
    assert "alert(1)</script>" not in path.read_text().replace("&lt;/script&gt;", "")
    assert set(page.scripts) == {"report-data", "splat-data", "code"}
    assert data["views"][0]["image"] == "</script><script>alert(1)</script>"
    assert "garden <b>&" in page.text


def test_the_summary_agrees_with_the_files(model: Path) -> None:
    page, _ = parse(write_report(model))
    cards = page.cards
    assert cards["PSNR"].startswith("31.23 dB 2 test views")
    assert cards["SSIM"].startswith("0.9123")
    assert cards["LPIPS"].startswith("0.1234")
    assert cards["Gaussians"].startswith("400 ")
    # two events of 11; the table of 400 rows was saved whole
    assert cards["Pruned by masks"].startswith("22 5.2 % of kept and pruned")
    assert cards["Pruned otherwise"].startswith("10 6 transparent, 4 too large")
    assert cards["Training time"].startswith("1 min 15 s 13.3 images per second")
    assert cards["Peak memory"].startswith("1.50 GiB")
    size = ModelFolder(model).point_cloud(1000).stat().st_size / 1e6
    assert cards["Model size"].startswith(f"{size:.1f} MB")


def test_the_final_prune_counts_as_pruned_by_masks(tmp_path: Path) -> None:
    write_log(tmp_path / "metrics.jsonl", make_records())
    assert pruned_by(read_log(tmp_path / "metrics.jsonl"), "pruned_mask", 390) == 22 + 10
    assert pruned_by(read_log(tmp_path / "metrics.jsonl"), "pruned_opacity", 390) == 6


@pytest.mark.parametrize(
    ("clock", "said"), [("gpu", "Time of the GPU"), ("host", "--enable_timer measures the GPU"), (None, "")]
)
def test_a_run_on_a_gpu_shows_its_memory_and_whose_time_it_is(model: Path, clock: str | None, said: str) -> None:
    records = make_records()
    for record in records:
        if clock is not None and record["kind"] in ("step", "end"):
            record.update(gpu_peak_bytes=5 << 28, gpu_peak_reserved_bytes=3 << 29)
        if clock is not None and record["kind"] == "phases":
            record["clock"] = clock
    write_log(ModelFolder.open(model).metrics, records)
    page, _ = parse(write_report(model))
    assert page.cards.get("Peak GPU memory") == (None if clock is None else "1.25 GiB 1.50 GiB held ")
    assert (said in page.text) if said else ("Time of the" not in page.text)


def test_curves_views_and_phases_agree_with_the_files(model: Path) -> None:
    page, data = parse(write_report(model))
    charts = {chart["id"]: chart for chart in data["charts"]}
    assert list(charts) == ["loss", "psnr", "gaussians", "events", "speed", "memory"]
    assert set(charts) <= {name.removeprefix("chart-") for name in page.ids}
    assert charts["loss"]["series"][0]["points"] == [[i, pytest.approx(0.2 - i / 1e4)] for i in range(100, 1001, 100)]
    assert charts["psnr"]["series"][0]["points"] == [[1000, 27.654]]
    assert [series["points"][-1][1] for series in charts["gaussians"]["series"]] == [400, 250.5]
    events = {series["name"]: series["points"] for series in charts["events"]["series"]}
    assert events["cloned"] == [[600, 30], [800, 60]]
    assert events["pruned by mask"] == [[600, 11], [800, 22]]
    # 100 images every 2 seconds, although the log says 3 per second
    assert charts["speed"]["series"][0]["points"][-1] == [1000, pytest.approx(50.0)]
    assert data["last_iteration"] == 1000
    assert data["heat_map"]["counts"][-1] == [5] * 19 + [1000]
    assert data["heat_map"]["maximum"] == 1000
    assert [(view["psnr"], view["ssim"], view["badge"]) for view in data["views"]] == [
        (30.01, 0.9, "worst"),
        (32.46, 0.92468, "best"),
    ]
    assert data["views"][1]["image"] == "photo1"
    # 20 seconds of training, 16 of them in phases
    assert re.search(r"project\s*4\.0 s\s*20\.0 %.*rasterize\s*12\.0 s\s*60\.0 %.*everything else\s*4\.0 s", page.text)


def test_pictures_are_those_of_the_folder(model: Path) -> None:
    _, data = parse(write_report(model))
    kind, _, content = data["views"][1]["render"].partition(",")
    assert kind == "data:image/png;base64"
    (model / "copy.png").write_bytes(base64.b64decode(content))
    with Image.open(model / "copy.png") as copy, Image.open(model / "test/ours_1000/renders/00001.png") as original:
        assert np.array_equal(np.array(copy), np.array(original))


def test_configuration_shows_what_was_given(model: Path) -> None:
    text = write_report(model).read_text()
    assert "python train.py -s &#x27;/data/garden &lt;b&gt;&amp;&#x27; --iterations 1000" in text
    assert '<dt class="changed">iterations</dt><dd class="changed">1000</dd>' in text
    assert "<dt>lambda_dssim</dt><dd>0.2</dd>" in text
    assert "6009" not in text  # flags without effect are left out


def test_a_folder_with_nothing_but_the_log(tmp_path: Path) -> None:
    write_log(tmp_path / "metrics.jsonl", make_records()[:-2])
    page, data = parse(write_report(tmp_path))
    assert data["model"] is None
    assert data["views"] == []
    assert page.scripts["splat-data"] == ""
    assert page.cards["PSNR"].startswith("27.65 dB test views at iteration 1,000")
    assert "LPIPS" not in page.cards
    assert "had not ended" in page.text


def test_no_log_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl .*train\.py wrote"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path / "nothing")


def test_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "-o", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").stat().st_size > 30_000
    assert "elsewhere.html" in capsys.readouterr().out
    with pytest.raises(InputError, match="one file, but several"):
        main([str(model), str(model), "-o", "x.html"])


def test_log_reader_survives_a_cut_and_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_log(path, make_records())
    lines = path.read_text().splitlines()
    whole = read_log(path)
    assert (len(whole.steps), whole.num_damaged_lines) == (10, 0)
    path.write_bytes("\n".join([*lines[:3], '{"kind": "st', "[1]", "\x00", *lines[3:]]).encode()[:-20])
    damaged = read_log(path)
    assert damaged.steps == whole.steps
    assert damaged.end is None
    assert damaged.num_damaged_lines == 4


@pytest.mark.parametrize("content", ["", "\n\n", "{", "[]\n3\n"])
def test_log_reader_refuses_a_file_without_a_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="no measurement"):
        read_log(tmp_path / "metrics.jsonl")


def test_charts_of_a_run_without_masks_or_numbers(tmp_path: Path) -> None:
    records = [{"kind": "step", "iteration": 1, "loss": None, "num_gaussians": 5, "expected_gaussians": 5.0}]
    write_log(tmp_path / "metrics.jsonl", records)
    log = read_log(tmp_path / "metrics.jsonl")
    assert heat_map(log) is None
    assert [chart.id for chart in build_charts(log)] == ["gaussians"]
    assert [series.name for series in build_charts(log)[0].series] == ["Gaussians"]


def test_thin_and_smooth_keep_the_mean_and_the_ends() -> None:
    points = tuple((float(i), float(i % 7)) for i in range(7000))
    few = thin(points, 1000)
    assert len(few) == 1000
    assert few[-1][0] == 6999
    assert np.mean([y for _, y in few]) == pytest.approx(3.0)
    line = tuple((float(i), 2.0 * i) for i in range(50))
    assert smooth(line) == pytest.approx(np.array(line))


def test_choose_pictured_takes_worst_best_and_some_between() -> None:
    ranked = [f"{i:03d}" for i in range(100)]
    chosen = choose_pictured(ranked, 12)
    assert len(chosen) == 12
    assert set(ranked[:4] + ranked[-4:]) <= chosen
    assert choose_pictured(ranked[:5]) == set(ranked[:5])


def test_difference_image_is_black_for_equal_and_bright_for_far_pixels() -> None:
    photo = np.zeros((1, 3, 3), np.uint8)
    render = np.array([[[0, 0, 0], [32, 32, 32], [255, 0, 0]]], np.uint8)
    picture = difference_image(photo, render)
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert picture[0, 1].sum() < picture[0, 2].sum()
    assert picture[0, 2].tolist() == [252, 253, 191]  # a mean of 85 is beyond the range of 64


def _viewer_cameras() -> list[ViewerCamera]:
    keys = ("width", "height", "fx", "fy")
    return [
        ViewerCamera(
            entry["img_name"],
            np.array(entry["position"]),
            np.array(entry["rotation"]),
            *(entry[key] for key in keys),
        )
        for entry in make_cameras()
    ]


def _unpack(packed) -> dict[str, np.ndarray]:
    """The viewer's decoding, written a second time."""
    info = packed.description
    planes = np.frombuffer(gzip.decompress(base64.b64decode(packed.payload)), np.uint8).reshape(17, info["num_shown"])
    words = planes[0:6:2].astype(np.float64) + 256.0 * planes[1:6:2]
    q = (words / 65535 * 4 - 2).T
    length = np.linalg.norm(q, axis=1, keepdims=True)
    s = np.where(length > 1, q / length / np.maximum(2 - length, 1e-4), q)
    low, high = info["log_scale"]
    quats = planes[9:13].T.astype(np.float64) - 128
    return {
        "means": s * info["radius"] + info["center"],
        "scales": low + planes[6:9].T / 255 * (high - low),
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "colors": planes[13:16].T / 255,
        "opacities": planes[16] / 255,
    }


def test_the_packed_model_unpacks_to_the_model() -> None:
    params, cameras = make_params(), _viewer_cameras()
    found = _unpack(pack_model(params, cameras))
    nearest = [int(np.argmin(np.linalg.norm(params["means"] - mean, axis=1))) for mean in found["means"]]
    assert sorted(nearest) == list(range(NUM_SPLATS))
    near = [i for i in range(NUM_SPLATS) if nearest[i] != 7]
    expected = {name: values[nearest].astype(np.float64) for name, values in params.items()}
    assert np.abs(found["means"] - expected["means"])[near].max() < 2e-3
    # the far splat keeps its direction within a hundredth of a degree
    far = nearest.index(7)
    one, two = (v[far] / np.linalg.norm(v[far]) for v in (found["means"], expected["means"]))
    assert np.linalg.norm(one - two) < 3e-4
    assert np.abs(found["scales"] - expected["scales"]).max() < 0.03
    unit = expected["quats"] / np.linalg.norm(expected["quats"], axis=1, keepdims=True)
    assert np.abs((found["quats"] * unit).sum(axis=1)).min() > 0.9999
    assert np.abs(found["opacities"] - 1 / (1 + np.exp(-expected["opacities"]))).max() < 0.003
    assert np.abs(found["colors"] - mean_colors(params, cameras)[nearest]).max() < 0.003


def test_the_most_visible_splats_stay() -> None:
    params = make_params(50)
    params["opacities"][:] = -1
    params["opacities"][:20] = 3
    params["scales"][:] = -2
    params["scales"][5:25] += 1
    packed = pack_model(params, _viewer_cameras(), most=15)
    assert (packed.description["num_total"], packed.description["num_shown"]) == (50, 15)
    assert (_unpack(packed)["opacities"] > 0.9).all()
    assert _unpack(packed)["scales"] == pytest.approx(-1, abs=0.01)


def test_colours_are_seen_from_the_cameras() -> None:
    params = {name: values[:1].copy() for name, values in make_params().items()}
    params["means"][:], params["sh0"][:], params["shN"][:] = 0, 0, 0
    params["shN"][0, 1] = [0.5, 0.0, -0.5]  # the z base: +C1 z of the direction from the camera to the splat
    camera = _viewer_cameras()[0]  # looks along +z
    expected = 0.5 + 0.4886025119029199 * np.array([0.5, 0.0, -0.5])
    assert mean_colors(params, [camera])[0] == pytest.approx(expected, abs=1e-5)
    assert up_direction([camera]) == pytest.approx([0, -1, 0])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page's scripts were not run")
def test_the_page_runs_in_a_browser_without_an_error(model: Path, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader", "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", write_report(model).as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body is not None, done.stderr
    assert 'data-ready="true"' in body[0]
    assert "data-error" not in body[0]
    message = re.search(r'<div class="space-message"[^>]*>([^<]*)', done.stdout)
    assert message is not None
    assert "hidden" in message[0] or "WebGL" in message[1]
    assert done.stdout.count('class="line') >= 8
    assert done.stdout.count("<rect") >= 200
