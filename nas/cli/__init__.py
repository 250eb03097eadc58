"""The `nas` command. Heavy imports happen inside the commands, so that `nas --help` is quick.

Results go to standard output, everything else to standard error, so that `--json` can be piped. A mistake of the user's is
one message and an exit code; a traceback is a bug of ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nas.cli import access, cluster, distillations, estimate, housekeeping, logs, models, registry, requests, results, searches, service
from nas.cli.errors import WRONG_INPUT, exit_code
from nas.errors import NasError
from nas.terminal import err

_HELP = """Which compressed shape of this language model should I pay to distil?

Register a teacher, a corpus and lm-eval tasks; submit a search to `nas serve`; read the leaderboard; distil the winner.
"""
_EXIT_CODES = (
    "Exit codes: 0 done, 1 the search (or the training) failed, 2 wrong input, 3 not found, "
    "4 not possible now (state, quota), 5 the service cannot be reached, 6 the API key is missing, wrong or may not do this, 130 interrupted."
)

app = typer.Typer(help=_HELP, epilog=_EXIT_CODES, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for name, group in (
    ("teachers", registry.teachers),
    ("corpora", registry.corpora),
    ("tasks", registry.tasks),
    ("keys", access.keys),
    ("projects", access.projects),
    ("distillations", distillations.commands),
):
    app.add_typer(group, name=name)
for module in (service, estimate, searches, requests, results, logs, models, cluster, housekeeping):
    app.add_typer(module.commands)


@app.callback()
def use_key(
    key_file: Annotated[Path | None, typer.Option(help="File that holds the API key (NAS_API_KEY_FILE); or put the key itself into NAS_API_KEY.")] = None,
) -> None:
    if key_file is not None:
        os.environ["NAS_API_KEY_FILE"] = str(key_file)


def main() -> None:
    """Entry point: errors of ours, and files that cannot be used, become one message and an exit code."""
    try:
        app(prog_name="nas")
    except BrokenPipeError:  # `nas ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] in ("nas", "api", "workers"):
            raise
        err.print(f"nas: this command needs {missing.name}: install nas with its extra `worker`", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(WRONG_INPUT)
    except (NasError, OSError, FloatingPointError) as error:
        err.print(f"nas: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))
