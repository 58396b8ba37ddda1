# SPDX-License-Identifier: Apache-2.0
"""The command lines: the frozen flags, the predecessors' defaults, their published commands, refusals and --help."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_values import model, train
from launch import prune_checks
from launch.cli import metrics_flags, parse_metrics, parse_render, parse_train, render_flags, train_flags
from launch.config import TrainConfig, cfg_args_values, pick, to_plain
from launch.parser import Flag
from scene.dataset import SceneOptions
from scene.errors import InputError
from scene.model_folder import ModelFolder
from strategies.density import DensityConfig
from strategies.importance import SCORES
from strategies.mask import MaskConfig
from strategies.methods import PRUNE_METHODS, PruneConfig
from strategies.optimizer_scaling import SCALE_MODES

__all__ = ["model"]  # a fixture

ROOT = Path(__file__).parents[1]
PICKED = (SceneOptions, DensityConfig, MaskConfig, PruneConfig)

# A flag that disappears or is renamed breaks somebody's script: change these lists only with a line in docs/parity.md.
TRAIN_FLAGS = """
adjust_strategy_warmp_iterations anneal_share anneal_to antialiasing auto_start_checkpoint backend border_divpos_coeff
bsz check_agreement check_cpu_memory check_gpu_memory checkpoint_iterations compute_cov3D_python convert_SHs_python
cuda_graphs data_device dataset_type debug debug_from densification_interval densify_from_iter densify_grad_threshold
densify_iteration densify_memory_limit_percentage densify_until_iter depth_l1_weight_final depth_l1_weight_init depths
detect_anomaly disable_auto_densification disable_viewer distributed_dataset_storage distributed_save doctor
drop_duplicate_gaussians_coeff drop_initial_3dgs_p enable_timer end2end_time eval exposure_lr_delay_mult
exposure_lr_delay_steps exposure_lr_final exposure_lr_init feature_lr gaussians_distribution grad_normalization_mode
gumbel_temp heuristic_decay image_cache_gb image_distribution image_distribution_mode images ip iterations
lambda_dssim lambda_mask llffhold local_sampling log_folder log_interval log_memory_summary lp_compat lr_scale_loss
lr_scale_mode lr_scale_pos_and_scale mask_estimator mask_from_iter mask_lr mask_prune_iter mask_until_iter min_opacity
model_path multiprocesses_image_loading no_heuristics_update nsys_profile num_test_cameras num_train_cameras
opacity_decay opacity_lr opacity_reset_interval opacity_reset_until_iter optimizer_type percent_dense port
position_lr_delay_mult position_lr_final position_lr_init position_lr_max_steps preload_dataset_to_gpu
preload_dataset_to_gpu_threshold preserving_ratio prune_finetune prune_iterations prune_method prune_percent
prune_use_percent_iterations quiet rad_prune_iterations rad_prune_threshold random_background random_prune_ratio
redistribute_gaussians_frequency redistribute_gaussians_mode redistribute_gaussians_threshold render_and_evaluate
report resolution rotation_lr save_iterations save_strategy_history scale_schedules scaling_lr seed setting sh_degree
simplification_iteration1 simplification_iteration2 source_path start_checkpoint start_pointcloud stop_after
stop_update_param sync_grad_mode target_gaussians target_mb test_iterations threads time_image_loading
train_mask_iters train_test_exp use_importance_mask wandb_run_name white_background zhx_debug zhx_time
"""
RENDER_FLAGS = """
adjust_strategy_warmp_iterations alpha antialiasing auto_start_checkpoint backend border_divpos_coeff bsz
check_cpu_memory check_gpu_memory checkpoint_iterations compute_cov3D_python convert_SHs_python cuda_graphs data_device
dataset_type debug debug_from depth depths detect_anomaly disable_viewer distributed_dataset_storage distributed_load
distributed_save drop_duplicate_gaussians_coeff drop_initial_3dgs_p enable_timer end2end_time eval
gaussians_distribution generate_num grad_normalization_mode heuristic_decay image_cache_gb image_distribution
image_distribution_mode images ip iteration l llffhold local_sampling log_folder log_interval log_memory_summary
model_path multiprocesses_image_loading no_heuristics_update nsys_profile num_test_cameras num_train_cameras
path path_fps path_frames path_height path_width port preload_dataset_to_gpu preload_dataset_to_gpu_threshold quiet r
redistribute_gaussians_frequency
redistribute_gaussians_mode redistribute_gaussians_threshold resolution sample_freq save_iterations
save_strategy_history sh_degree skip_test skip_train source_path start_checkpoint stop_update_param
sync_grad_mode test_iterations threads time_image_loading train_test_exp wandb_run_name white_background
zhx_debug zhx_time
"""
METRICS_FLAGS = "lpips mode model_paths quiet threads"
COMPANIONS = {
    "use_importance_mask": "--prune_method rad_splat",
    "lp_compat": "--prune_method rad_splat --use_importance_mask",
    "prune_finetune": "--start_pointcloud a.ply",
}
"""Flags without which a Boolean is an error."""

SHORT_SPELLINGS = {"s": "source_path", "m": "model_path", "i": "images", "r": "resolution", "w": "white_background"}

# What the predecessors' code has (spec 2.2, 3.2, 5.2); every deviation of ours is in DELIBERATE, and in docs/parity.md.
PREDECESSOR_DEFAULTS = {
    "sh_degree": 3, "images": "images", "resolution": -1, "white_background": False, "data_device": "cuda",
    "eval": False, "convert_SHs_python": False, "compute_cov3D_python": False, "debug": False,
    "iterations": 30_000, "position_lr_init": 1.6e-4, "position_lr_final": 1.6e-6, "position_lr_delay_mult": 0.01,
    "position_lr_max_steps": 30_000, "feature_lr": 0.0025, "opacity_lr": 0.05, "scaling_lr": 0.005,
    "rotation_lr": 0.001, "mask_lr": 0.01, "percent_dense": 0.01, "lambda_dssim": 0.2, "lambda_mask": 0.0005,
    "densification_interval": 100, "opacity_reset_interval": 3000, "densify_from_iter": 500,
    "densify_until_iter": 15_000, "densify_grad_threshold": 0.0002, "mask_prune_iter": 1000, "mask_from_iter": 0,
    "mask_until_iter": 30_000, "random_background": False, "ip": "127.0.0.1", "port": 6009, "debug_from": -1,
    "detect_anomaly": False, "quiet": False, "checkpoint_iterations": [], "start_checkpoint": "",
    "auto_start_checkpoint": False, "log_folder": "/tmp/gaussian_splatting", "log_interval": 250, "llffhold": 8,
    "lr_scale_loss": 1.0, "lr_scale_pos_and_scale": 1.0, "opacity_reset_until_iter": -1,
    "densify_memory_limit_percentage": 0.9, "disable_auto_densification": False, "min_opacity": 0.005,
    "lr_scale_mode": "sqrt", "image_distribution": True, "image_distribution_mode": "final", "heuristic_decay": 0.0,
    "no_heuristics_update": False, "border_divpos_coeff": 1.0, "adjust_strategy_warmp_iterations": -1,
    "save_strategy_history": False, "gaussians_distribution": True,
    "redistribute_gaussians_mode": "random_redistribute", "redistribute_gaussians_frequency": 10,
    "redistribute_gaussians_threshold": 1.1, "sync_grad_mode": "dense", "grad_normalization_mode": "none", "bsz": 1,
    "distributed_dataset_storage": True, "distributed_save": True, "local_sampling": False,
    "preload_dataset_to_gpu": False, "preload_dataset_to_gpu_threshold": 10.0, "multiprocesses_image_loading": True,
    "num_train_cameras": -1, "num_test_cameras": -1, "enable_timer": False, "end2end_time": True, "zhx_time": False,
    "check_gpu_memory": False, "check_cpu_memory": False, "log_memory_summary": False, "zhx_debug": False,
    "stop_update_param": False, "time_image_loading": False, "nsys_profile": False, "drop_initial_3dgs_p": 0.0,
    "drop_duplicate_gaussians_coeff": 1.0, "use_importance_mask": False, "prune_iterations": [19_500],
    "train_mask_iters": 500, "gumbel_temp": 0.5, "prune_use_percent_iterations": [20_000], "prune_percent": 0.6,
    "random_prune_ratio": 0.1, "simplification_iteration1": 15_000, "simplification_iteration2": 20_000,
    "preserving_ratio": 0.1, "rad_prune_threshold": 0.01, "rad_prune_iterations": [19_500],
    "densify_iteration": [-1], "start_pointcloud": "", "wandb_run_name": "",
}  # fmt: skip
DELIBERATE = {
    "backend": "diff", "prune_method": "mask", "test_iterations": [7000, 30_000],
    "redistribute_gaussians_mode": "morton", "redistribute_gaussians_frequency": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [(train_flags(), TRAIN_FLAGS), (render_flags(), RENDER_FLAGS), (metrics_flags(), METRICS_FLAGS)],
    ids=["train", "render", "metrics"],
)
def test_flags_are_frozen(flags: tuple[Flag, ...], frozen: str) -> None:
    names = [each.name for each in flags]
    assert sorted(names) == frozen.split()
    assert all(
        each.doc and each.spec.source in {"3DGS", "Grendel", "MaskGaussian", "LP-3DGS", "ours"} for each in flags
    )


def test_short_spellings() -> None:
    assert {each.spec.short[1:]: each.name for each in train_flags() if each.spec.short} == {
        **SHORT_SPELLINGS,
        "d": "depths",
    }
    values = train("-s data -m out -i images_2 -r 4 -w")
    assert values["source_path"] == str(Path.cwd() / "data")
    assert (values["model_path"], values["images"], values["resolution"], values["white_background"]) == (
        "out",
        "images_2",
        4,
        True,
    )


def test_defaults_are_the_predecessors() -> None:
    values = train("-s data -m out")
    known = {**PREDECESSOR_DEFAULTS, **DELIBERATE}
    assert {name: values[name] for name in known} == known
    ours = {each.name for each in train_flags() if each.spec.source == "ours"}
    newest_3dgs = {
        name for name in values if re.match(r"exposure_|depth|train_test_exp|optimizer_type|disable_v|anti", name)
    }
    rest = set(values) - set(known) - ours - newest_3dgs
    assert rest == {"source_path", "model_path", "save_iterations"}


def test_every_boolean_is_negatable_in_both_spellings() -> None:
    booleans = [each for each in train_flags() if each.kind is bool]
    assert len(booleans) > 30
    for each in booleans:
        for spelling in (f"--no_{each.name}", f"--no-{each.name}", f"--no-{each.name.replace('_', '-')}"):
            assert train(f"-s data {spelling}")[each.name] is False, spelling
        if not each.spec.refused:
            needed = COMPANIONS.get(each.name, "")
            assert train(f"-s data {needed} --no_{each.name} --{each.name}")[each.name] is True


def test_dashes_and_underscores_are_the_same_and_values_stay() -> None:
    values = train(
        "-s data --mask-prune-iter=500 --position_lr-init 1e-3 --images=a-b_c -m --x-y".replace("-m --x-y", "")
    )
    assert (values["mask_prune_iter"], values["position_lr_init"], values["images"]) == (500, 1e-3, "a-b_c")


def test_shortened_flags() -> None:
    assert train("-s data --iter 40 --white --mask_l .02")["iterations"] == 40
    with pytest.raises(InputError, match=r"ambiguous option: --densify could match .*--densify_from_iter"):
        train("-s data --densify 3")


def test_later_values_win_as_with_argparse() -> None:
    assert train("-s data --save_iterations 5 --save_iterations 6 --iterations 9")["save_iterations"] == [6, 9]


@pytest.mark.parametrize(
    ("command", "test", "save"),
    [
        ("", [7000, 30_000], [7000, 30_000]),
        ("--iterations 7000", [7000], [7000]),
        ("--iterations 500", [500], [500]),
        ("--iterations 35000", [7000, 30_000, 35_000], [7000, 30_000, 35_000]),
        ("--iterations 100 --test_iterations 50 --save_iterations 20 10 20 900", [50], [10, 20, 100]),
        ("--iterations 100 --test_iterations", [], [100]),
        ("--iterations 100 --save_iterations -1", [100], [100]),
    ],
)
def test_iteration_lists(command: str, test: list[int], save: list[int]) -> None:
    values = train(f"-s data {command}")
    assert (values["test_iterations"], values["save_iterations"]) == (test, save)


def test_settings_are_the_papers_and_given_flags_win() -> None:
    found = {name: train(f"-s data --setting {name}") for name in ("alpha", "beta", "gamma")}
    window = ("lambda_mask", "mask_from_iter", "mask_until_iter")
    assert {name: tuple(values[key] for key in window) for name, values in found.items()} == {
        "alpha": (0.1, 19_000, 20_000),
        "beta": (0.0005, 0, 30_000),
        "gamma": (0.001, 0, 30_000),
    }
    assert train("-s data --lambda_mask .2 --setting alpha")["lambda_mask"] == 0.2
    with pytest.raises(InputError, match="--setting alpha is a preset of the learned masks"):
        train("-s data --setting alpha --prune_method 3dgs")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("-m out", "no data: give the folder of a data set with -s"),
        ("-s ''", "argument -s/--source_path: invalid path value"),
        ("-s data --iterations 0", "--iterations 0 is impossible: give a number of at least 1"),
        ("-s data --bsz 0", "--bsz 0 is impossible"),
        ("-s data --iterations many", "--iterations: invalid whole number value: 'many'"),
        ("-s data --iterations 1.5", "invalid whole number value: '1.5'"),
        ("-s data --lambda_mask nan", "--lambda_mask nan is impossible"),
        ("-s data --lambda_mask -1", "--lambda_mask -1.0 is impossible"),
        ("-s data --lambda_dssim 2", "give a number from 0 to 1"),
        ("-s data --sh_degree 4", "--sh_degree 4 is impossible: give a number from 0 to 3"),
        ("-s data --lambda_maks 1", "Did you mean --lambda_mask?"),
        ("-s data surplus", "unrecognized arguments: surplus"),
        ("-s data --mask_from_iter 9 --mask_until_iter 8", "the mask loss would end before it begins"),
        ("-s data --position_lr_final 0", "the schedule between them is logarithmic"),
    ],
)
def test_mistakes_name_flag_and_fix(command: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        train(command)


def test_numbers_may_be_written_as_people_do() -> None:
    values = train("-s data --iterations 30_000 --densify_until_iter 1.5e4 --position_lr_init 16e-5")
    assert (values["iterations"], values["densify_until_iter"], values["position_lr_init"]) == (30_000, 15_000, 16e-5)


def test_flags_without_effect_say_so_once() -> None:
    config = parse_train(shlex.split("-s data --port 6010 --port 6011 --zhx_debug --sync_grad_mode sparse --eval"), {})
    assert sorted(notice.split()[0] for notice in config.notices) == ["--port", "--sync_grad_mode", "--zhx_debug"]
    assert all("has no effect: " in notice for notice in config.notices)
    assert parse_train(["-s", "data"], {}).notices == ()
    assert parse_train(shlex.split("-s data --prune_method 3dgs --lambda_mask 1"), {}).notices == (
        "--lambda_mask has no effect: --prune_method 3dgs does not read it.",
    )


def test_default_model_path() -> None:
    assert train("-s data", OAR_JOB_ID="1234567890123")["model_path"] == "output/1234567890"
    first, second = (train("-s data")["model_path"] for _ in range(2))
    assert re.fullmatch(r"output/[0-9a-f]{10}", str(first))
    assert first != second


def test_defaults_of_flags_and_modules_agree() -> None:
    config = TrainConfig()
    assert pick(SceneOptions, config.model) == SceneOptions()
    assert pick(DensityConfig, config.density, config.model) == DensityConfig()
    assert pick(MaskConfig, config.mask) == MaskConfig()
    with pytest.raises(KeyError):
        pick(MaskConfig, config.model)
    specs = {each.name: each.spec for each in train_flags()}
    assert set(specs["lr_scale_mode"].choices) == set(SCALE_MODES)
    assert specs["prune_method"].choices == PRUNE_METHODS
    assert pick(PruneConfig, config.prune) == PruneConfig()
    assert prune_checks.SCORES == SCORES


def test_doctor_needs_no_data() -> None:
    config = parse_train(["--doctor"], {})
    assert config.logging.doctor
    assert "source_path" not in config.given


def test_render_reads_what_a_predecessor_stored(model: Path) -> None:
    config = parse_render(["-m", str(model)])
    assert config.model.source_path == Path("/data/garden")
    assert (config.model.images, config.model.eval, config.model.white_background) == ("images_4", True, True)
    assert config.model.sh_degree == 2
    assert config.model.llffhold == 8


def test_render_prefers_our_configuration(model: Path) -> None:
    trained = parse_train(shlex.split(f"-s data -m {model} --eval --llffhold 5 --antialiasing --backend reference"), {})
    folder = ModelFolder(model)
    folder.write_config(to_plain(trained), ["train.py"])
    folder.write_cfg_args(cfg_args_values(trained.model))
    config = parse_render(["-m", str(model)])
    assert config.model == trained.model
    assert config.pipeline.antialiasing
    assert config.pipeline.backend == "diff", "the body that draws is not a property of the model"
    assert parse_render(["-m", str(model), "--no-antialiasing"]).pipeline.antialiasing is False


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Namespace(source_path='d', resolution='wide')", "resolution = 'wide', which is not of the expected kind"),
        ("Namespace(source_path='d', eval=1)", "eval = 1, which is not of the expected kind"),
        ("Namespace(source_path='d', resolution=True)", "resolution = True, which is not of the expected kind"),
        ("Namespace(source_path='d', sh_degree=9)", "--sh_degree 9 is impossible"),
        ("Namespace(source_path='d', train_test_exp=True)", "--train_test_exp on is refused"),
    ],
)
def test_render_checks_what_is_stored(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "cfg_args").write_text(text)
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse_render(["-m", str(tmp_path)])


def test_render_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="render.py has no model"):
        parse_render([])
    with pytest.raises(InputError, match="does not exist"):
        parse_render(["-m", str(tmp_path / "absent")])
    with pytest.raises(InputError, match="neither config.json nor cfg_args"):
        parse_render(["-m", str(tmp_path)])
    assert parse_render(["-m", str(tmp_path), "-s", "data"]).model.source_path == Path.cwd() / "data"


def test_metrics_without_a_model() -> None:
    for command in ([], ["-m"]):
        with pytest.raises(InputError, match="metrics.py has no model"):
            parse_metrics(command)


@pytest.mark.parametrize(
    ("parse", "flags"),
    [(parse_train, train_flags()), (parse_render, render_flags()), (parse_metrics, metrics_flags())],
    ids=["train", "render", "metrics"],
)
def test_help(
    parse: Callable[[list[str]], object],
    flags: tuple[Flag, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    body, _, hidden = text.partition("\nAccepted for the predecessors'")
    entries = {re.split(r"\s{2,}|\n", entry.strip())[0]: entry for entry in re.split(r"\n(?=  -)", body)}
    for each in flags:
        found = [entry for head, entry in entries.items() if re.search(rf"(^|[ ,])--{each.name}\b", head)]
        is_hidden = bool(each.spec.inert or (each.spec.refused and not each.spec.allowed))
        assert (f"--{each.name}" in hidden.split()) == is_hidden, each.name
        assert len(found) == (0 if is_hidden else 1), each.name
        for entry in found:
            folded = " ".join(entry.split())
            assert f"{each.spec.source}]" in folded, each.name
            assert each.doc in folded, each.name
    for name in ("iterations", "bsz"):
        for each in flags:
            if each.name == name and not each.spec.inert:
                assert f"[{each.default} images; {each.spec.source}]" in " ".join(text.split())


def test_parity_page_lists_what_is_refused_or_without_effect() -> None:
    text = (ROOT / "docs" / "parity.md").read_text()
    patterns = [re.escape(word).replace(r"\*", r"\w+") for word in re.findall(r"--(\w+\*?)", text)]
    listed = {
        each.name for each in (*train_flags(), *render_flags()) if any(re.fullmatch(p, each.name) for p in patterns)
    }
    for each in train_flags():
        if each.spec.inert or each.spec.refused:
            assert each.name in listed, f"docs/parity.md does not mention --{each.name}"


def read_names(path: Path) -> set[str]:
    """Names that a source file reads as attributes, or spells as words in a text (getattr, lists of fields)."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_flag_is_silently_ignored() -> None:
    """Every flag that is neither refused nor said to be without effect is read somewhere outside the command line."""
    declared = {"flag.py", "flag_groups.py", "flag_groups_process.py", "config.py", "cli.py", "parser.py", "presets.py"}
    folders = ("scene", "strategies", "gaussian_renderer", "launch")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.name not in declared]
    files += [path for path in (ROOT / "train.py", ROOT / "render.py", ROOT / "metrics.py") if path.is_file()]
    read = set().union(*map(read_names, files)) | {name for kind in PICKED for name in kind.__dataclass_fields__}
    flags = (*train_flags(), *render_flags(), *metrics_flags())
    alive = {each.name for each in flags if not each.spec.inert and not (each.spec.refused and not each.spec.allowed)}
    assert alive - read - {"setting"} == set()


def test_numbers_out_of_reach_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    command = "-s data --iterations 10 --checkpoint_iterations 5 50 -5 --threads 1000"
    notices = " ".join(parse_train(shlex.split(command), {}).notices)
    assert "--checkpoint_iterations 50 never comes: --iterations is 10." in notices
    assert "--checkpoint_iterations -5 never" in notices and "iterations 5 never" not in notices
    assert "--threads 1000 is more than the 2 processors" in notices
    assert not parse_train(shlex.split("-s data --iterations 10 --threads 2 --checkpoint_iterations 10"), {}).notices
