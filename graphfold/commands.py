"""Commands whose options are built only when they are run: help lists names and purposes.

Reading the annotations of every command takes longer than the rest of `graphfold --help`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {}


def add(name: str, command: Callable[..., None], *, epilog: str) -> None:
    """Add a command to the command line; help lists them in the order of the calls."""
    _COMMANDS[name] = (command, epilog)


class Commands(TyperGroup):
    """The commands that were added."""

    def __init__(self, **options: Any) -> None:
        purposes = {name: inspect.getdoc(each) for name, (each, _) in _COMMANDS.items()}
        listed = {name: TyperCommand(name, help=purpose) for name, purpose in purposes.items()}
        super().__init__(**{**options, "commands": listed})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command that is run, with its options."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _with_options(name), rest


def _with_options(name: str) -> Any:
    command, epilog = _COMMANDS[name]
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name, epilog=epilog)(command)
    return typer.main.get_command(alone)
