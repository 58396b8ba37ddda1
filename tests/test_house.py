# SPDX-License-Identifier: Apache-2.0
"""The house rules hold over all our own Python, and each rule catches the offence it is there for."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

import house_rules as house
from house_rules import EVERYWHERE, KERNELS, PROGRAM_ONLY, ROOT, Rule, Source, other_sources, program_sources

HEAD = '# SPDX-License-Identifier: Apache-2.0\n"""Text."""\nfrom __future__ import annotations\n'

OFFENCES = [
    (house.long_functions, "scene/x.py", "def f():\n" + "    x = 1\n" * 60),
    (house.long_functions, "scene/x.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 60),
    (house.long_modules, "scene/x.py", "x = 1\n" * 501),
    (house.missing_licence_line, "scene/x.py", None),
    (house.missing_future_annotations, "scene/x.py", None),
    (house.bare_excepts, "scene/x.py", "try:\n    x = 1\nexcept:\n    pass\n"),
    (house.bare_excepts, "scene/x.py", "try:\n    x = 1\nexcept Exception:\n    pass\n"),
    (house.names_of_machines, "scene/x.py", "x = '/ho" + "me/somebody/data'\n"),
    (house.missing_docstrings, "scene/x.py", "def f():\n    return 1\n"),
    (house.missing_docstrings, "scene/x.py", "class A:\n    '''Text.'''\n    def f(self):\n        return 1\n"),
    (house.wrong_direction, "scene/x.py", "from strategies.mask import MaskPruning\n"),
    (house.wrong_direction, "strategies/x.py", "def f():\n    import gaussian_renderer.step\n"),
    (house.wrong_direction, "distributed/x.py", "from scene.errors import InputError\n"),
    (house.wrong_direction, "gaussian_renderer/x.py", "import launch.config\n"),
    (house.wrong_direction, "launch/x.py", "import train\n"),
    (house.wrong_direction, f"{KERNELS}/x.py", "from scene.errors import InputError\n"),
    (house.torch_distributed_elsewhere, "scene/x.py", "import torch.distributed as dist\n"),
    (house.torch_distributed_elsewhere, "scene/x.py", "from torch import distributed\n"),
    (house.torch_distributed_elsewhere, "train.py", "import torch\nx = torch.distributed.is_initialized()\n"),
    (house.environment_elsewhere, "scene/x.py", "import os\nx = os.environ['A']\n"),
    (house.environment_elsewhere, "train.py", "from os import getenv\n"),
    (house.environment_elsewhere, "distributed/communicator.py", "import os\nx = os.environ['A']\n"),
    (house.dangerous_calls, "scene/x.py", "x = eval('1')\n"),
    (house.dangerous_calls, "scene/x.py", "import pickle\n"),
    (house.dangerous_calls, "scene/x.py", "subprocess.run('ls', shell=True)\n"),
    (house.dangerous_calls, "scene/x.py", "x = np.load('a', allow_pickle=True)\n"),
    (house.dangerous_calls, "scene/x.py", "x = torch.load('a')\n"),
    (house.dangerous_calls, "scene/x.py", "x = torch.load('a', weights_only=False)\n"),
    (house.input_asserts, "scene/x.py", "assert 1 == 1\n"),
    (house.module_state, "scene/x.py", "CACHE = {}\n"),
    (house.module_state, "scene/x.py", "def f():\n    global x\n    x = 1\n"),
]

INNOCENT = [
    (house.wrong_direction, "launch/x.py", "from gaussian_renderer.rendering import render_view\n"),
    (house.wrong_direction, "scene/x.py", "import scene.errors\nimport masksplat.random\nimport distributed.plan\n"),
    (house.wrong_direction, "train.py", "import strategies.mask, launch.config\n"),
    (house.environment_elsewhere, "launch/x.py", "import os\nx = os.environ\n"),
    (
        house.environment_elsewhere,
        "distributed/communicator.py",
        "class C:\n    def from_environment():\n        return os.environ\n",
    ),
    (house.dangerous_calls, "scene/x.py", "x = torch.load('a', weights_only=True)\nmodel.eval()\n"),
    (house.long_functions, "scene/x.py", "def f():\n" + "    x = 1\n" * 59),
]


@pytest.mark.parametrize("rule", [*EVERYWHERE, *PROGRAM_ONLY], ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    sources = program_sources() + (other_sources() if rule in EVERYWHERE else [])
    offences = [line for source in sources for line in rule(source)]
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_rule_catches(rule: Rule, path: str, text: str | None) -> None:
    assert list(rule(Source(path, "def f() -> None: ...\n" if text is None else HEAD + text)))


@pytest.mark.parametrize(("rule", "path", "text"), INNOCENT)
def test_rule_lets_pass(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(path, HEAD + text)))


def test_every_rule_has_an_offence() -> None:
    assert {rule for rule, _, _ in OFFENCES} == {*EVERYWHERE, *PROGRAM_ONLY}


def test_all_packages_are_looked_at() -> None:
    packages = {source.package for source in program_sources()}
    assert packages == {*house.MAY_IMPORT, "train", "render", "metrics"}


def test_function_length_budget() -> None:
    lengths = sorted(house.length(function) for source in program_sources() for function in source.functions())
    assert len(lengths) > 300
    median, ninth_decile = statistics.median(lengths), lengths[int(0.9 * len(lengths))]
    assert median <= 12 and ninth_decile <= 40, f"median {median}, 90 % {ninth_decile} lines"


def test_installer_needs_the_standard_library_only() -> None:
    source = house.read(ROOT / "launch" / "install.py")
    foreign = {module.split(".")[0] for _, module in source.imports()} - set(sys.stdlib_module_names)
    assert foreign == set()


def test_no_generated_file_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    names = tracked.stdout.splitlines()
    assert "Makefile" in names
    unwanted = (".pyc", ".nbi", ".nbc", ".ckpt", ".pth", ".ply")
    assert [name for name in names if name.endswith(unwanted) or name.startswith((".venv/", "output/"))] == []


def test_versions_agree() -> None:
    """The Python that is claimed, the Python that ruff and mypy assume, and the constraints that exist."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text and 'target-version = "py310"' in text
    assert list((ROOT / "constraints").glob("python3.*.txt"))
