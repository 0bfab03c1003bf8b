"""The command line, one file per command. Commands import torch when they run, so that --help is instant.

Exit codes: 0 fine; 1 failure; 2 bad usage or input; 3 a finding; 130 stopped by Ctrl-C. Errors are one line on
stderr; `--debug`, before or after the command, adds the traceback.
"""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

import lipcert
from lipcert.errors import Finding, InputError, unknown

COMMANDS = ("train", "bound", "certify", "attack", "verify", "report", "export", "models", "data", "presets", "env")


class LazyGroup(click.Group):
    """Imports `lipcert.cli.NAME` when command NAME is asked for, and takes its `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        command: click.Command = importlib.import_module(f"lipcert.cli.{name}").command
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: lipcert train --preset digits -o runs/digits",
)
@click.version_option(lipcert.__version__, prog_name="lipcert", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """Train, audit and certify Lipschitz vision models in l2.

    MODEL is a run folder, the name of a model (lipcert models), torchvision:NAME, timm:NAME, hf:PATH, a .pt2 or .onnx
    file, or path/to/file.py:factory.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        handler = logging.StreamHandler()
        log = logging.getLogger("lipcert")
        log.addHandler(handler)
        level = log.level
        log.setLevel(logging.INFO)
        try:
            code = _run([text for text in given if text != "--debug"], debug)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
    sys.exit(code)


def _run(args: list[str], debug: bool) -> int:
    try:
        result = cli.main(args=args, prog_name="lipcert", standalone_mode=False)
        return result if isinstance(result, int) else 0  # --help and --version return click's exit code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(error, error.format_message(), 2, debug)
    except Finding as error:
        return _fail(error, str(error), 3, debug, prefix="Finding")
    except (click.Abort, KeyboardInterrupt) as error:
        return _fail(error, "finished rows and epochs are kept; --resume continues", 130, debug, prefix="Stopped")
    except Exception as error:
        if _is_input(error):
            return _fail(error, str(error), 2, debug)
        ours = type(error).__module__.partition(".")[0] == "lipcert"  # its text is written for users
        text = str(error) if ours else f"{type(error).__name__}: {error} (--debug shows where)"
        return _fail(error, text, 1, debug)


def _is_input(error: Exception) -> bool:
    """Whether the user can mend it: an InputError, or the BoundError of lipcert.bounds, which does not know ours."""
    core = sys.modules.get("lipcert.bounds.core")
    return isinstance(error, InputError) or (core is not None and isinstance(error, core.BoundError))


def _fail(error: BaseException, text: str, code: int, debug: bool, prefix: str = "Error") -> int:
    if debug:
        traceback.print_exception(error)
    click.echo(f"{prefix}: {text}", err=True)
    return code


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    click.echo(f"Warning: {message}", err=True)
