# SPDX-License-Identifier: Apache-2.0
"""The commands of the predecessors' READMEs and scripts: understood, or refused with the sentence that helps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cli_values import model, train
from launch.cli import parse_metrics, parse_render
from launch.config import to_plain
from scene.errors import InputError

__all__ = ["model"]  # a fixture

# Commands as they stand in the READMEs and scripts (spec 2.1, 3.1, 3.12, 5.1); <...> and variables filled in.
TRAIN_COMMANDS = [
    ("train.py -s data/garden", {"eval": False, "bsz": 1}),
    ("train.py -s data/garden --eval", {"eval": True, "llffhold": 8, "prune_method": "mask"}),
    ("train.py -s data/garden -m output/garden --eval", {"model_path": "output/garden"}),
    (
        "torchrun --standalone --nnodes=1 --nproc-per-node=4 train.py --bsz 4 -s data/garden --eval",
        {"bsz": 4, "lr_scale_mode": "sqrt", "eval": True},
    ),
    (
        "torchrun --standalone --nnodes=1 --nproc-per-node=4 train.py -s d/bicycle --images images_4 --llffhold 8 "
        "--iterations 30000 --log_interval 250 --model_path e/4g_4b/e_bicycle --bsz 4 --enable_timer --end2end_time "
        "--check_gpu_memory --check_cpu_memory --test_iterations 7000 15000 30000 --save_iterations 7000 30000 --eval",
        {"images": "images_4", "test_iterations": [7000, 15_000, 30_000], "save_iterations": [7000, 30_000], "bsz": 4},
    ),
    (
        "python train.py -s d/room --images images_2 --llffhold 8 --iterations 30000 --log_interval 250 --model_path "
        "e/1g_1b/e_room --bsz 1 --enable_timer --end2end_time --check_gpu_memory --check_cpu_memory "
        "--test_iterations 7000 15000 30000 --save_iterations 7000 30000 --eval",
        {"images": "images_2", "model_path": "e/1g_1b/e_room"},
    ),
    (
        "torchrun --standalone --nnodes=1 --nproc-per-node=4 train.py -s d/garden --images images --llffhold 8 "
        "--iterations 50000 --log_interval 250 --model_path e/4g_1b_4k/e_garden --bsz 1 --enable_timer --end2end_time "
        "--check_gpu_memory --check_cpu_memory --test_iterations 7000 15000 30000 50000 --save_iterations 7000 30000 "
        "50000 --preload_dataset_to_gpu_threshold 0 --eval --densify_grad_threshold 0.0001 --percent_dense 0.002",
        {"iterations": 50_000, "save_iterations": [7000, 30_000, 50_000], "preload_dataset_to_gpu_threshold": 0.0},
    ),
    (
        "torchrun --standalone --nnodes=1 --nproc-per-node=4 train.py -s d/truck --images images --llffhold 8 "
        "--iterations 30000 --log_interval 250 --model_path e/4g_8b/e_truck --bsz 8 --enable_timer --end2end_time "
        "--check_gpu_memory --check_cpu_memory --test_iterations 7000 15000 30000 --save_iterations 7000 30000 --eval",
        {"bsz": 8},
    ),
    (
        "train.py -s data/gs_datasets/room -m output/room_0.1_19000_20000_cuda --eval --lambda_mask 0.1 "
        "--mask_from_iter 19000 --mask_until_iter 20000 --data_device cuda",
        {"lambda_mask": 0.1, "mask_from_iter": 19_000, "mask_until_iter": 20_000},
    ),
    ("train.py -s data -m out --lambda_mask .001 --mask_lr .01 --mask_prune_iter 1000", {"lambda_mask": 0.001}),
    ("train.py -s data -m out --iteration 35000 --position_lr_max_steps 35000", {"iterations": 35_000}),
    (
        "train.py -s 360/bicycle -i images_4 -m ./eval/bicycle --quiet --eval --test_iterations -1",
        {"quiet": True, "test_iterations": [], "images": "images_4"},
    ),
    ("train.py -s tandt/truck -m ./eval/truck --quiet --eval --test_iterations -1", {"test_iterations": []}),
    ("train.py -s data -m out --eval --prune_method 3dgs", {"prune_method": "3dgs"}),
    ("train.py -s data -m out --backend default", {"backend": "default"}),
    ("train.py -s data -m out --backend diff", {"backend": "diff"}),
    ("train.py -s data -r 1 --ip 0.0.0.0 --port 6035 --debug_from 5 --detect_anomaly --quiet", {"resolution": 1}),
    ("train.py -s data --lr_scale_mode linear --preload_dataset_to_gpu", {"lr_scale_mode": "linear"}),
    (
        "train.py -s data --checkpoint_iterations 7000 3000 50000 --auto_start_checkpoint",
        {"checkpoint_iterations": [3000, 7000], "auto_start_checkpoint": True},
    ),
    (
        "train.py -s data/gs_datasets/room -m output/room_0.1 --eval --port 6041 --start_checkpoint X/chkpnt30000.pth "
        "--iteration 35000 --lambda_mask 0.1 --position_lr_max_steps 35000",
        {"start_checkpoint": "X/chkpnt30000.pth", "iterations": 35_000},
    ),
    ("train.py -s data --drop_initial_3dgs_p 0.5 --stop_update_param", {"drop_initial_3dgs_p": 0.5}),
    (
        "train.py -s data -m out --eval --prune_method rad_splat --use_importance_mask",
        {"prune_method": "rad_splat", "use_importance_mask": True, "prune_iterations": [19_500]},
    ),
    ("train.py -s data -m out --eval --prune_method mini_splatting", {"prune_percent": 0.6}),
    ("train.py -s data -m out --prune_method rad_splat --prune_percent .8", {"prune_percent": 0.8}),
    ("train.py -s data -m out --eval --prune_method compact_3dgs", {"prune_method": "compact_3dgs"}),
    ("train.py -s data --prune_iterations 15000", {"prune_iterations": [15_000]}),
    ("train.py -s data --backend gsplat", {"backend": "gsplat"}),
    ("train.py -s data --backend cuda", {"backend": "cuda"}),
]
REFUSED_TRAIN_COMMANDS = [
    ("train.py -s data --start_pointcloud a.ply", "--iterations is 30000: nothing is left to train"),
    ("train.py -s data --prune_finetune", "--prune_finetune has no trained model: give one with --start_pointcloud"),
    ("train.py -s data --drop_duplicate_gaussians_coeff 2", "--drop_duplicate_gaussians_coeff 2.0 is refused"),
    ("train.py -s data --image_distribution_mode 3", "--image_distribution_mode 3 is refused"),
    ("train.py -s data -d depths", "--depths depths is refused"),
    ("train.py -s data --train_test_exp", "--train_test_exp on is refused"),
    ("train.py -s data --optimizer_type sparse_adam", "--optimizer_type sparse_adam is refused"),
    ("train.py -s d/train --images --llffhold 8", "argument -i/--images: expected one argument"),
    ("train.py -s 360/garden --prune_method mini-splatting", "invalid choice"),
]


def arguments_of(command: str, script: str) -> str:
    """What follows the script's name in a command."""
    return command.partition(script)[2]


@pytest.mark.parametrize(("command", "expected"), TRAIN_COMMANDS)
def test_published_train_commands(command: str, expected: dict[str, object]) -> None:
    values = train(arguments_of(command, "train.py"))
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(("command", "sentence"), REFUSED_TRAIN_COMMANDS)
def test_refused_train_commands(command: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        train(arguments_of(command, "train.py"))


def test_refused_flags_accept_their_default() -> None:
    values = train("-s data --start_pointcloud '' --prune_percent 0.6 --prune_iterations 19500 --checkpoint_iterations")
    assert values["prune_iterations"] == [19_500]
    assert values["checkpoint_iterations"] == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("render.py -m MODEL --skip_train", {"skip_train": True, "skip_test": False}),
        ("python render.py -s data/garden --model_path MODEL --skip_train", {"skip_train": True, "eval": True}),
        ("render.py -s d/garden --model_path MODEL --iteration 7000 --skip_train --llffhold 8", {"iteration": 7000}),
        (
            "torchrun --standalone --nnodes=1 --nproc-per-node=4 render.py -s d/garden --images images_4 --model_path "
            "MODEL --iteration 29993 --llffhold 8 --skip_train --bsz 4",
            {"iteration": 29_993, "images": "images_4"},
        ),
        ("render.py --iteration 7000 -s 360/garden -m MODEL --quiet --eval --skip_train", {"quiet": True}),
        ("render.py -m MODEL --distributed_load --generate_num 5 --sample_freq 2 --l 3 --r 9", {"l": 3, "r": 9}),
        (
            "render.py -m MODEL -r 2 --no_eval --skip-test --depth --alpha",
            {"resolution": 2, "eval": False, "depth": True},
        ),
    ],
)
def test_published_render_commands(command: str, expected: dict[str, object], model: Path) -> None:
    config = to_plain(parse_render(shlex.split(arguments_of(command, "render.py").replace("MODEL", str(model)))))
    values = {**config["model"], **config["pipeline"], **config["render"]}
    assert {name: values[name] for name in expected} == expected
    assert values["model_path"] == str(model), "the folder given wins over the one in cfg_args"


@pytest.mark.parametrize(
    ("command", "paths", "mode"),
    [
        ("metrics.py -m A", ["A"], "test"),
        ("metrics.py -m A B C", ["A", "B", "C"], "test"),
        ("python metrics.py --model_path A --mode test", ["A"], "test"),
        ("python metrics.py --mode test --model_paths A", ["A"], "test"),
        ("metrics.py -m A --mode train", ["A"], "train"),
        ("metrics.py -m A -m B", ["A", "B"], "test"),
    ],
)
def test_published_metrics_commands(command: str, paths: list[str], mode: str) -> None:
    metrics = to_plain(parse_metrics(shlex.split(arguments_of(command, "metrics.py"))))["metrics"]
    assert (metrics["model_paths"], metrics["mode"]) == (paths, mode)
