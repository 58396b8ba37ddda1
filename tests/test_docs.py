# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists: files, links, tests, make targets, flags; the commands are understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launch.cli import metrics_flags, parse_metrics, parse_train, render_flags, train_flags
from scene.model_folder import SPLITS, ModelFolder

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("**/*.md"))))
OF_OTHERS = {
    *("--help", "--durations"),  # argparse, pytest
    *("--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--headless", "--hide-scrollbars", "--no-sandbox", "--screenshot", "--window-size", "--virtual-time-budget"),
    *("--views", "--output", "--architecture"),  # our modules outside the three scripts
    *("--protocol", "--data", "--methods", "--seeds", "--add", "--post_iterations", "--gpus", "--jobs"),  # run_all
}
WRITTEN = re.compile(
    r"(demo-output|output|checkpoints|before-1|point_cloud|sparse|images|FOLDER|MODEL|OUT|tests/test_MODULE)\b"
)
"""Beginnings of paths that the program writes or that belong to the user."""
FILES_OF_MODELS = {"config.json", "manifest.json", "cameras.json", "results.json", "per_view.json", "scales.json"}
FILES_OF_MODELS |= {"results_train.json", "per_view_train.json", "started.json"}
FILES_OF_DATA_SETS = {"transforms_train.json", "transforms_test.json"}
FILES_OF_NERFSTUDIO = {"camera_path.json", "dataparser_transforms.json"}
FILES_OF_PREDECESSORS = {"run_all.py", "prune_finetune.py", "convert.py", "args.json", "results_test.json"}
SUFFIXES = (".py", ".md", ".toml", ".txt", ".cff", ".yaml", ".json", ".png")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code_words(text: str) -> list[str]:
    """The spans in single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def typed_lines(text: str) -> list[str]:
    """The lines of fenced blocks that have no language, without comments: what people type."""
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def missing_files(text: str, document: str) -> set[str]:
    """Paths in backticks and targets of links that are not in the repository, seen from its root or the document."""
    known = FILES_OF_MODELS | FILES_OF_DATA_SETS | FILES_OF_NERFSTUDIO | FILES_OF_PREDECESSORS
    words = {word.split("::")[0] for word in code_words(text)} - known
    paths = {word for word in words if re.fullmatch(r"\w[\w./-]*", word) and word.endswith((*SUFFIXES, "/"))}
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    folders = (ROOT, (ROOT / document).parent, ROOT / "docs", ROOT / "tests", ROOT / "submodules/masksplat/masksplat")
    wanted = {path for path in paths if not WRITTEN.match(path)}
    lost = {path for path in wanted if not any((folder / path).exists() for folder in folders)}
    return lost | {link for link in links if not (ROOT / document).parent.joinpath(link).exists()}


@cache
def names_of_tests() -> dict[str, frozenset[str]]:
    """The tests of each file, by its path from the root."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    texts = {f"tests/{file.name}": file.read_text(encoding="utf-8") for file in files}
    return {path: frozenset(re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)) for path, text in texts.items()}


def missing_tests(text: str, document: str) -> set[str]:
    """Tests in backticks, with or without their file, that do not exist."""
    words = [word for word in code_words(text) if re.fullmatch(r"(tests/\w+\.py::)?test_\w+", word)]
    anywhere = frozenset().union(*names_of_tests().values())
    split = [word.rpartition("::") for word in words]
    return {name for path, _, name in split if name not in (names_of_tests().get(path, ()) if path else anywhere)}


def missing_targets(text: str, document: str) -> set[str]:
    """Targets of `make` commands that the Makefile does not have."""
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    commands = [*code_words(text), *typed_lines(text)]
    return {match[1] for each in commands if (match := re.match(r"(?:\w+=\S+ )*make ([a-z-]+)", each))} - targets


def missing_flags(text: str, document: str) -> set[str]:
    """Long flags in code that none of the scripts has."""
    flags = (*train_flags(), *render_flags(), *metrics_flags())
    spellings = {f"--{each.name}" for each in flags} | {alias for each in flags for alias in each.spec.aliases}
    code = " ".join([*code_words(text), *typed_lines(text)])
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)) - OF_OTHERS
    negated = {f"--no_{each.name}" for each in flags if each.default is False or each.default is True}
    return {each for each in named if each not in spellings | negated}


def names_of_machines(text: str, document: str) -> set[str]:
    return {word for word in ("/wo" "rk/", "/ro" "ot/", "/ho" "me/") if word in text}


Check = Callable[[str, str], set[str]]
CHECKS = (missing_files, missing_tests, missing_targets, missing_flags, names_of_machines)
SPEAKS_OF_OTHERS = {missing_flags: {"docs/parity.md"}}
"""parity.md names flags of the predecessors, also those that we do not have."""


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_document_names_exists(check: Check, document: str) -> None:
    if document not in SPEAKS_OF_OTHERS.get(check, ()):
        assert check(text_of(document), document) == set()


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_files, "see `scene/nothing.py`"),
        (missing_files, "see `nothing/`"),
        (missing_files, "see [it](docs/nothing.md)"),
        (missing_tests, "see `test_nothing_at_all`"),
        (missing_tests, "see `tests/test_ply.py::test_rule_holds`"),
        (missing_targets, "type `make nothing`"),
        (missing_targets, "\n```\nmake nothing ARGS=1\n```\n"),
        (missing_flags, "with `--nothing 3`"),
        (missing_flags, "\n```\npython train.py --iteratoins 3   # text\n```\n"),
        (names_of_machines, "in /ho" "me/somebody"),
    ],
)
def test_each_check_catches(check: Check, text: str) -> None:
    assert check(text, "README.md")


def commands_of_the_readme(script: str) -> list[str]:
    """What the README types, or says about predecessors' commands, that calls a script of ours."""
    text = text_of("README.md")
    spans = [span for row in text.splitlines() if row.startswith("|") for span in code_words(row)]
    calls = [*spans, *typed_lines(text)]
    return [call for call in calls if re.search(rf"(^|\s){re.escape(script)} -", call)]


@pytest.mark.parametrize("command", commands_of_the_readme("train.py"))
def test_training_commands_of_the_readme_are_understood(command: str) -> None:
    parse_train(shlex.split(command.partition("train.py")[2]), {})


@pytest.mark.parametrize("command", commands_of_the_readme("metrics.py"))
def test_measuring_commands_of_the_readme_are_understood(command: str) -> None:
    assert parse_metrics(shlex.split(command.partition("metrics.py")[2])).metrics.model_paths


def test_the_readme_has_commands_to_check() -> None:
    assert len(commands_of_the_readme("train.py")) >= 8
    assert len(commands_of_the_readme("metrics.py")) >= 3
    assert {"make demo", "make test"} <= set(typed_lines(text_of("README.md")))


def test_pictures_are_small_enough_for_a_checkout() -> None:
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".jpg", ".svg", ".gif")]
    assert sum(path.stat().st_size for path in pictures) < 3_000_000


def test_flags_of_our_own_are_listed_in_parity() -> None:
    line = re.search(r"Flags of train.py that no predecessor has: (.*?)\n\n", text_of("docs/parity.md"), re.DOTALL)
    assert line is not None
    listed = {word.lstrip("-") for word in code_words(line[1])}
    assert listed == {flag.name for flag in train_flags() if flag.spec.source == "ours"}


def test_the_readme_lists_every_file_of_measures() -> None:
    """What metrics.py writes for either set."""
    table = text_of("README.md").partition("## What is written")[2].partition("```")[0]
    folder = ModelFolder(Path("model"))
    files = {path.name for split in SPLITS for path in (folder.results(split), folder.per_view(split))}
    assert {name for name in files if f"`{name}`" not in table} == set()
