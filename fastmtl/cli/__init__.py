"""The command line. Nothing here imports torch before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from ..errors import FastMTLError
from .parser import parse

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 an unexpected failure, 2 a mistake of the user, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if "torch" not in sys.modules:
        # Threads that wait by spinning make small ops many times slower on a machine with other work on it.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        args = parse(words)
        command = importlib.import_module(f".{args.command}", __name__)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command.run(args)
            sys.stdout.flush()
    except FastMTLError as error:
        return _fail(USER_ERROR, f"error: {error}", debug)
    except KeyboardInterrupt as interrupt:
        return _fail(INTERRUPTED, f"interrupted{f': {interrupt}' if str(interrupt) else ''}", debug)
    except BrokenPipeError:
        # Whoever read our output stopped; the interpreter must not try to flush it again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(FAILED, "error: the reader of our output closed it", debug)
    except Exception as error:
        hint = "" if debug else "; run it again with --debug for the traceback"
        return _fail(FAILED, f"unexpected failure: {type(error).__name__}: {error}{hint}", debug)
    return OK


def _fail(code: int, message: str, debug: bool) -> int:
    """Say what went wrong in one line; the traceback only where it was asked for."""
    if debug:
        traceback.print_exc()
    print(f"fastmtl: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"fastmtl: warning: {' '.join(str(message).split())}", file=sys.stderr)
