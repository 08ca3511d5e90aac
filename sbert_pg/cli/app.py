"""``sbert-pg``: the command and its exit codes."""

from __future__ import annotations

import importlib
import sys

import sqlalchemy as sa
import typer
from rich.markup import escape

from sbert_pg.cli import common
from sbert_pg.errors import SbertPgError

#: Modules that bring commands, in the order of ``--help``.
COMMAND_MODULES = (
    "sbert_pg.cli.demo",
    "sbert_pg.cli.schema",
    "sbert_pg.cli.data",
    "sbert_pg.cli.encoder",
    "sbert_pg.cli.worker",
    "sbert_pg.cli.upkeep",
    "sbert_pg.cli.reembed",
    "sbert_pg.cli.adopt",
    "sbert_pg.cli.cluster",
    "sbert_pg.cli.duplicates",
)

EPILOG = (
    "Without --database (or SBERT_PG_DATABASE_URL), commands start the embedded server in your "
    "user data directory and stop it after. Exit codes: 0 done, 1 failed or a check did not hold, "
    "2 wrong usage, 3 database unreachable, 130 interrupted."
)


def build_app() -> typer.Typer:
    """The application with the commands of every module."""
    app = typer.Typer(
        name="sbert-pg",
        help="Embeddings in Postgres as naturally as any other column.",
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    ) -> None:
        if version:
            from importlib.metadata import version as installed

            typer.echo(f"sbert-pg {installed('sbert-pg')}")
            raise typer.Exit

    for name in COMMAND_MODULES:
        importlib.import_module(name).register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        result = build_app()(args=arguments, standalone_mode=False)
        return result if isinstance(result, int) else common.EXIT_OK
    except KeyboardInterrupt:
        common.note("Interrupted.")
        return common.EXIT_INTERRUPTED
    except SbertPgError as error:
        common.err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        return common.EXIT_FAILED
    except sa.exc.OperationalError as error:
        common.err.print(f"[bold red]Database error[/]: {escape(str(error.orig).strip())}")
        return common.EXIT_UNREACHABLE
    except sa.exc.DBAPIError as error:
        common.err.print(f"[bold red]Database error[/]: {escape(str(error.orig).strip())}")
        return common.EXIT_FAILED
    except Exception as error:
        return _from_click(error)


def _from_click(error: Exception) -> int:
    """What click raises without its standalone mode: usage errors, aborts and exits."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", common.EXIT_USAGE))
    if type(error).__name__ == "Abort":
        common.note("Interrupted.")
        return common.EXIT_INTERRUPTED
    if type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", 0))
    raise error


if __name__ == "__main__":
    main()
