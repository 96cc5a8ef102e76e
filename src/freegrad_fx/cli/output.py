"""What the commands print: tables, JSON, warnings and errors. Colour only on a terminal."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..errors import CaptureError, PlanError, RuleError, TorchVersionError
from ..plan.layout import aligned, as_json, plain, terminal_width

__all__ = [
    "Commands",
    "UserError",
    "file_error",
    "in_a_line",
    "print_json",
    "print_rows",
    "print_text",
    "reported",
]

# Words of a report that name what may not be meant
_ALARMS = r"SKIPPED|LOST|MATCHES NOTHING|NOT VERIFIED|THE FORWARD IS CHANGED|does not load"


class UserError(Exception):
    """Something that the user can mend. It is printed without a traceback."""


def file_error(name: str, what: str, error: OSError) -> UserError:
    """The error for a file that cannot be read or written."""
    return UserError(f"{name} cannot be {what}: {error.strerror or error}")


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Report every error of code that the user or another package wrote as an error of the user.

    Args:
        what: What fails, as a clause.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as error:
        raise UserError(
            f"{what}: {in_a_line(error)}. `freegrad-fx --traceback ...` shows where."
        ) from error


def in_a_line(error: BaseException) -> str:
    """An error as Python prints it, without a full stop."""
    return f"{type(error).__name__}: {error}".strip().rstrip(".:")


USER_ERRORS = (UserError, RuleError, PlanError, CaptureError, TorchVersionError)


class Commands(TyperGroup):
    """The commands. A user's error becomes a line on stderr and the exit code 1; warnings become lines, too."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        traceback = ctx.params.get("traceback", False)
        with warnings.catch_warnings(record=True) as found:
            try:
                return super().invoke(ctx)
            except USER_ERRORS as error:
                if traceback:
                    raise
                _print_problem("error", "bold red", str(error))
                raise typer.Exit(1) from None
            finally:
                for text in dict.fromkeys(str(warning.message) for warning in found):
                    _print_problem("warning", "yellow", text)


def _print_problem(kind: str, style: str, text: str) -> None:
    line = Text.assemble((f"{kind}:", style), f" {text}")
    _console(stderr=True).print(line, soft_wrap=True)


def print_text(text: str) -> None:
    """Print text as it is, with the alarming words in red."""
    styled = Text(text)
    styled.highlight_regex(_ALARMS, "bold red")
    _console().print(styled, soft_wrap=True)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as an aligned table. The first row is the head."""
    styled = Text(aligned(rows, terminal_width()))
    styled.highlight_regex(r"\A.*", "bold")
    styled.highlight_regex(_ALARMS, "bold red")
    _console().print(styled, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print plain data as JSON. Functions and tensors become text."""
    typer.echo(as_json(plain(data), indent=2))


def _console(stderr: bool = False) -> Console:
    # not a constant: sys.stdout can be replaced after the import
    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False, markup=False)
