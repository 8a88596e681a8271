"""The command line: ``fastxent`` or ``python -m fastxent``.

Exit codes: 0 all is well; 1 a check of ``demo`` failed, or a provider of ``bench`` is broken; 2 wrong options or files, told
in one line on stderr; 130 Ctrl-C. Each command imports what it needs, and nothing else is imported here, so ``--help`` is
instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastxent._cli.output import CommandError, one_line
from fastxent._cli.parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name. Default: those of the process.

    Returns
    -------
    int
        The exit code. Wrong usage raises ``SystemExit(2)``, ``--help`` ``SystemExit(0)``, as argparse does.
    """
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        if sys.stdout is not None:  # a program may be started without one
            sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"fastxent {args.command}: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # "fastxent info | head": nobody reads on, and Python's own flush at exit must not fail
        _discard_output()
        return 0
    except OSError as error:  # a full disk
        _discard_output()
        print(f"fastxent {args.command}: error: {one_line(str(error))}", file=sys.stderr)
        return 2


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
