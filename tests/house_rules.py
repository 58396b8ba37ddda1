# SPDX-License-Identifier: Apache-2.0
"""The house rules as functions of a parsed source file: each yields one line per offence."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "submodules/masksplat/masksplat"
PACKAGES = ("distributed", "scene", "strategies", "gaussian_renderer", "launch", KERNELS)
SCRIPTS = ("train.py", "render.py", "metrics.py")
LONGEST_FUNCTION = 60
LONGEST_MODULE = 500

MAY_IMPORT = {
    "masksplat": frozenset[str](),
    "distributed": frozenset({"masksplat"}),
    "scene": frozenset({"masksplat", "distributed"}),
    "strategies": frozenset({"masksplat", "distributed", "scene"}),
    "gaussian_renderer": frozenset({"masksplat", "distributed", "scene"}),
    "launch": frozenset({"masksplat", "distributed", "scene", "strategies", "gaussian_renderer"}),
}
"""Which of our packages each package may import besides itself; everything else of ours is forbidden to it."""

OURS = frozenset({*MAY_IMPORT, "train", "render", "metrics", "tests", "bench"})


@dataclass(frozen=True)
class Source:
    """One of our files: its path below the root and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def package(self) -> str:
        """The package the file belongs to; the module's own name for a script."""
        if self.path.startswith(KERNELS):
            return "masksplat"
        return self.path.split("/")[0].removesuffix(".py")

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, module) of every import, also of those inside functions; `from a import b` yields a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def read(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def program_sources() -> list[Source]:
    """Return every file of the program itself."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    scripts = [ROOT / script for script in SCRIPTS]
    return [read(path) for path in [*paths, *scripts] if path.exists()]


def other_sources() -> list[Source]:
    """Return the tests and benchmarks."""
    return [read(path) for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from `def` to its end; decorators do not count."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def long_functions(source: Source) -> Iterator[str]:
    for function in source.functions():
        if length(function) > LONGEST_FUNCTION:
            yield f"{source.path}:{function.lineno} {function.name} has {length(function)} lines"


def long_modules(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > LONGEST_MODULE:
        yield f"{source.path} has {lines} lines"


def missing_licence_line(source: Source) -> Iterator[str]:
    if not source.text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
        yield f"{source.path} does not begin with the SPDX line"


def missing_future_annotations(source: Source) -> Iterator[str]:
    has_types = any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AnnAssign) for node in source.tree.body)
    if has_types and "from __future__ import annotations" not in source.text:
        yield f"{source.path} lacks `from __future__ import annotations`"


def missing_docstrings(source: Source) -> Iterator[str]:
    if ast.get_docstring(source.tree) is None:
        yield f"{source.path} has no module docstring"
    yield from _undocumented(source, source.tree)


def _undocumented(source: Source, scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None and not _is_overload(node):
                yield f"{source.path}:{node.lineno} {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from _undocumented(source, node)


def _is_overload(node: ast.AST) -> bool:
    return any("overload" in ast.dump(decorator) for decorator in getattr(node, "decorator_list", ()))


def wrong_direction(source: Source) -> Iterator[str]:
    allowed = MAY_IMPORT.get(source.package)
    if allowed is None:  # a script: it may import every package
        allowed = frozenset(MAY_IMPORT)
    for line, module in source.imports():
        top = module.split(".")[0]
        if top in OURS and top != source.package and top not in allowed:
            yield f"{source.path}:{line} {source.package} imports {top}"


def torch_distributed_elsewhere(source: Source) -> Iterator[str]:
    if source.package == "distributed":
        return
    for line, module in source.imports():
        if module.startswith("torch.distributed"):
            yield f"{source.path}:{line} imports torch.distributed"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield f"{source.path}:{node.lineno} uses torch.distributed"


def environment_elsewhere(source: Source) -> Iterator[str]:
    """Reads of the environment outside launch/ and Communicator.from_environment."""
    if source.package == "launch":
        return
    excused: set[int] = set()
    if source.path == "distributed/communicator.py":
        for function in source.functions():
            if function.name == "from_environment":
                excused |= {id(node) for node in ast.walk(function)}
    for node in ast.walk(source.tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        if name in ("environ", "environb", "getenv", "putenv") and id(node) not in excused:
            yield f"{source.path}:{getattr(node, 'lineno', 0)} touches the environment ({name})"


CALLS = frozenset({"eval", "exec", "os.system", "os.popen", "numpy.fromregex"})
MODULES = frozenset({"pickle", "cPickle", "dill", "shelve", "marshal"})
RESTRICTED_UNPICKLER = "gaussian_renderer/lpips.py"
"""Reads LPIPS weights of a known SHA-256 through an unpickler that knows three NumPy names (design page, section 6)."""


def dangerous_calls(source: Source) -> Iterator[str]:
    """Calls that run text or load objects: eval, exec, pickle, a shell, torch.load without weights_only."""
    for line, module in source.imports():
        if module.split(".")[0] in MODULES and source.path != RESTRICTED_UNPICKLER:
            yield f"{source.path}:{line} imports {module}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS or name in ("pickle.load", "pickle.loads"):
                yield f"{source.path}:{node.lineno} calls {name}"
            if keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False":
                yield f"{source.path}:{node.lineno} {name} with a shell or with pickle"
            if name.endswith("torch.load") and keywords.get("weights_only") != "True":
                yield f"{source.path}:{node.lineno} torch.load without weights_only=True"


def bare_excepts(source: Source) -> Iterator[str]:
    """Handlers of everything that do not raise again."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if caught == "" or (caught in ("Exception", "BaseException") and not raises):
                yield f"{source.path}:{node.lineno} catches everything"


def input_asserts(source: Source) -> Iterator[str]:
    """Asserts without a message: those with shapes in the message guard against our own mistakes."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"{source.path}:{node.lineno} assert without a message"


def module_state(source: Source) -> Iterator[str]:
    """`global` statements, and module-level names bound to an empty container (it is there to be filled)."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.path}:{node.lineno} global {', '.join(node.names)}"
    for node in source.tree.body:
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is not None and ast.unparse(value) in ("[]", "{}", "set()", "dict()", "list()", "defaultdict(list)"):
            yield f"{source.path}:{node.lineno} mutable module state"


def names_of_machines(source: Source) -> Iterator[str]:
    """Paths of a developer's machine."""
    for number, line in enumerate(source.text.splitlines(), start=1):
        if any(word in line for word in ("/wo" "rk/", "/ro" "ot/", "/ho" "me/")):
            yield f"{source.path}:{number} names a path of somebody's machine"


Rule = Callable[[Source], Iterator[str]]

EVERYWHERE: tuple[Rule, ...] = (
    long_functions,
    long_modules,
    missing_licence_line,
    missing_future_annotations,
    bare_excepts,
    names_of_machines,
)
PROGRAM_ONLY: tuple[Rule, ...] = (
    missing_docstrings,
    wrong_direction,
    torch_distributed_elsewhere,
    environment_elsewhere,
    dangerous_calls,
    input_asserts,
    module_state,
)
