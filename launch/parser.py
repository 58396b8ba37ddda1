# SPDX-License-Identifier: Apache-2.0
"""Generates argparse parsers from the flag groups, and checks the values that come out.

Dashes and underscores inside a long flag are the same (`--mask-lr`, `--mask_lr`), a unique beginning of a flag is
enough (`--iteration` for `--iterations`, as the predecessors' scripts have it), and every Boolean has its `--no_` form.
Mistakes are raised as InputError; nothing here exits or prints except `--help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.flag import FlagSpec, field_docs, spec_of
from scene.errors import InputError

EFFECTLESS_TITLE = "Accepted for the predecessors' scripts, without effect here (each says why when it is given)"
LATER_TITLE = "Refused with the reason when the value is not the predecessor's default"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One command line flag: where it is kept, what it takes, and what is known about it."""

    group: type
    name: str
    kind: Any
    default: Any
    spec: FlagSpec
    doc: str


def flags_of(group: type) -> tuple[Flag, ...]:
    """The flags a dataclass of `launch/flag_groups*.py` declares, in its order."""
    kinds, docs = typing.get_type_hints(group), field_docs(group)
    return tuple(
        Flag(group, field.name, kinds[field.name], field.default, spec_of(field), docs[field.name])
        for field in dataclasses.fields(group)
    )


class _RaisingParser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are InputErrors naming the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage of a hundred flags and exiting."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        hint = ""
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0].split("=")[0]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"command line of {self.prog}: {message}.{hint} All flags: python {self.prog} --help")


class _BooleanAction(argparse.Action):
    """Stores True for `--name` and its short spelling, False for `--no_name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string != f"--no_{self.dest}")


def normalize_arguments(arguments: Iterable[str]) -> list[str]:
    """The arguments with dashes inside the names of long flags turned into underscores; values stay as they are."""
    result = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            argument = "--" + name.replace("-", "_") + equals + value
        result.append(argument)
    return result


def build_parser(script: str, summary: str, flags: Sequence[Flag]) -> argparse.ArgumentParser:
    """An argparse parser for `flags` that leaves out of its namespace what was not given.

    Args:
        script: file name shown in the usage line.
        summary: first paragraph of --help; its lines are kept.
        flags: in the order of --help; names must differ.
    """
    parser = _RaisingParser(
        prog=script,
        usage=f"python {script} [flags]",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    sections: dict[str, Any] = {}
    for each in flags:
        title, description = _section(each)
        if title not in sections and _is_shown(each):
            sections[title] = parser.add_argument_group(title, description)
        _add_argument(sections[title] if _is_shown(each) else parser, each)
    parser.epilog = _hidden_flags_text(flags)
    return parser


def _is_shown(each: Flag) -> bool:
    """True for flags with an entry of their own in --help: those whose value can make a difference."""
    return not each.spec.inert and not (each.spec.refused and not each.spec.allowed)


def _section(each: Flag) -> tuple[str, str]:
    """Title and description of the --help section of a flag: the two halves of its group's docstring."""
    title, _, rest = (each.group.__doc__ or each.group.__name__).partition(": ")
    rest = " ".join(rest.split())
    return title.strip(". \n"), rest[:1].upper() + rest[1:]


def _hidden_flags_text(flags: Sequence[Flag]) -> str:
    """The end of --help: names of the flags that are accepted without effect, and of those refused for now."""
    inert = [f"--{each.name}" for each in flags if each.spec.inert]
    later = [f"--{each.name}" for each in flags if not each.spec.inert and not _is_shown(each)]
    parts = []
    for title, names in ((EFFECTLESS_TITLE, inert), (LATER_TITLE, later)):
        if names:
            body = textwrap.fill(
                " ".join(names), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
            parts.append(f"{title}:\n{body}")
    return "\n\n".join(parts)


def _add_argument(section: Any, each: Flag) -> None:
    names = [each.spec.short] if each.spec.short else []
    names += [f"--{each.name}", *each.spec.aliases]
    keywords: dict[str, Any] = {"dest": each.name, "help": _help(each) if _is_shown(each) else argparse.SUPPRESS}
    if each.kind is bool:
        section.add_argument(*names, f"--no_{each.name}", action=_BooleanAction, **keywords)
        return
    element = _element_type(each.kind)
    keywords["type"] = _converter(element)
    if each.kind is not element:
        keywords.update(nargs="*", action="extend" if element is Path else "store")
    if each.spec.choices:
        keywords["choices"] = each.spec.choices
    else:
        keywords["metavar"] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}[element]
    section.add_argument(*names, **keywords)


def _element_type(kind: Any) -> Any:
    """The type of one value: the element type for tuple[T, ...], otherwise the type itself."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def _converter(element: Any) -> Callable[[str], Any]:
    """A converter from text whose name argparse prints in its messages; integers may be written 30_000 or 3e4."""

    def path(text: str) -> Path:
        if not text or "\0" in text:
            raise ValueError(text)
        return Path(text)

    def number(text: str) -> int:
        value = float(text.replace("_", ""))
        if not value.is_integer():
            raise ValueError(text)
        return int(text) if "." not in text and "e" not in text.lower() else int(value)

    number.__name__ = "whole number"
    return {int: number, Path: path}.get(element, element)


def _help(each: Flag) -> str:
    """The docstring, then in brackets what is known of default, unit and source."""
    value = " ".join(filter(None, (show_value(each.default), each.spec.unit)))
    return f"{each.doc} [{'; '.join(filter(None, (value, each.spec.source)))}]".replace("%", "%%")


def show_value(value: Any) -> str:
    """A value as one would type it: on/off for Booleans, spaces between list elements, nothing for empty."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, Path):
        return "" if value == Path() else str(value)
    return str(value)


def parse_given(parser: argparse.ArgumentParser, flags: Sequence[Flag], arguments: Sequence[str]) -> dict[str, Any]:
    """The values that the command line gives, by flag name, checked one by one.

    Raises:
        InputError: an unknown flag, a value of the wrong kind or out of range, or one that is refused.
    """
    found = vars(parser.parse_args(normalize_arguments(arguments)))
    given = {each.name: _as_kind(each, found[each.name]) for each in flags if each.name in found}
    for each in flags:
        if each.name in given:
            check_value(each, given[each.name])
    return given


def _as_kind(each: Flag, value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_value(each: Flag, value: Any) -> None:
    """Raises InputError when a value is out of range, not a finite number, not a choice, or refused."""
    spec, name = each.spec, f"--{each.name}"
    for item in value if isinstance(value, tuple) else (value,):
        if spec.choices and item not in spec.choices:
            raise InputError(f"{name} {item}: not one of {', '.join(spec.choices)}")
        if isinstance(item, str | bool | Path):
            continue
        low, high = spec.minimum, spec.maximum
        if not math.isfinite(item) or (low is not None and item < low) or (high is not None and item > high):
            raise InputError(f"{name} {show_value(item)} is impossible: give {_range_text(low, high)}.")
    if spec.refused and value != each.default and value not in spec.allowed:
        raise InputError(f"{name} {show_value(value)}".strip() + f" is refused: {spec.refused}.")


def _range_text(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"a number from {low:g} to {high:g}"
    return f"a number of at least {low:g}" if low is not None else "a finite number"


def notices_of(flags: Sequence[Flag], given: dict[str, Any]) -> list[str]:
    """One sentence for each flag given that has no effect."""
    inert = [each for each in flags if each.spec.inert and each.name in given]
    return [f"--{each.name} has no effect: {each.spec.inert}." for each in inert]
