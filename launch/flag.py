# SPDX-License-Identifier: Apache-2.0
"""What a command line flag is: a dataclass field with a docstring under it and a `FlagSpec` in its metadata.

Knows nothing of argparse (`launch/parser.py`) nor of any particular flag (`launch/flag_groups*.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """Everything about a flag that its type, default and docstring do not say."""

    source: str = "ours"
    """The program the name comes from: 3DGS, Grendel, MaskGaussian, LP-3DGS, or ours."""
    short: str = ""
    """One-letter spelling such as "-s"; empty: none."""
    aliases: tuple[str, ...] = ()
    """Further long spellings, with the two dashes."""
    choices: tuple[str, ...] = ()
    """The only values accepted; empty: any."""
    unit: str = ""
    """Unit shown by --help, for example "images"."""
    minimum: float | None = None
    """Smallest value accepted (each element of a list); None: no bound."""
    maximum: float | None = None
    """Largest value accepted; None: no bound."""
    inert: str = ""
    """Why the flag changes nothing in this program; empty: it has an effect."""
    refused: str = ""
    """Why values other than the default and `allowed` are refused; empty: nothing is refused."""
    allowed: tuple[Any, ...] = ()
    """Values besides the default that work although `refused` is set."""


def flag(default: Any, spec: FlagSpec | None = None, /, **details: Any) -> Any:
    """Declares a dataclass field that becomes a command line flag.

    Args:
        default: value when the flag is not given; it must not be mutable.
        spec: the whole description; None builds one from `details`, the fields of `FlagSpec`.
    """
    return dataclasses.field(default=default, metadata={"flag": spec or FlagSpec(**details)})


def spec_of(field: dataclasses.Field[Any]) -> FlagSpec:
    """The `FlagSpec` of a field declared by `flag`.

    Raises:
        KeyError: the field was declared without `flag`.
    """
    spec = field.metadata["flag"]
    if not isinstance(spec, FlagSpec):
        raise KeyError(field.name)
    return spec


@functools.cache
def field_docs(group: type) -> Mapping[str, str]:
    """The docstrings written under the fields of a dataclass, whitespace folded, by field name.

    They are read from the source text, so `group` must be defined in a file.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(group)))
    definition = tree.body[0]
    if not isinstance(definition, ast.ClassDef):
        raise TypeError(f"{group!r} is not a class")
    docs: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return MappingProxyType(docs)
