"""``sbert-pg``: the command and its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import sqlalchemy as sa
import typer
from rich.markup import escape

from sbert_pg.cli import (
    cluster,
    common,
    data,
    demo,
    doctor,
    encoder,
    freshness,
    reembed,
    schema,
    serve,
    tuning,
)
from sbert_pg.errors import SbertPgError, StepStoppedError

#: Commands in the order of ``--help``, and those of the groups.
COMMANDS: tuple[Callable[..., None], ...] = (
    demo.demo, schema.migrate, schema.status, doctor.doctor,
    data.load, data.search, data.passages, tuning.evaluate, tuning.tune,
    freshness.worker, freshness.backfill, freshness.failed, freshness.audit, reembed.adopt,
    serve.serve, serve.serve_postgres,
)  # fmt: skip
GROUPS: dict[str, tuple[str, tuple[Callable[..., None], ...]]] = {
    "index": ("Vector indexes, measured.", (tuning.advise,)),
    "encoder": (
        "Convert, look at, measure and choose encoders.",
        (encoder.convert, encoder.show, encoder.choose),
    ),
    "reembed": (
        "A change of encoder: begin, backfill, verify, switch, finish.",
        (reembed.begin, reembed.status, reembed.verify, reembed.finish, reembed.abort),
    ),
    "cluster": (
        "Topics of a table: runs, clusters and assignments as rows of tables.",
        (cluster.run, cluster.show, cluster.assign, cluster.map_),
    ),
}

#: Where commands went that were once called so.
MOVED = {
    "mcp": "It is 'sbert-pg serve --mcp'",
    "duplicates": "It is duplicate_pairs() of sbert_pg.clustering in Python",
    "encoder limits": "It is 'sbert-pg encoder show --limits'",
    "encoder measure": "It is 'sbert-pg encoder show --speed'",
    "explore": "It is 'sbert-pg serve --explore'",
}
EPILOG = (
    "Without --database (or SBERT_PG_DATABASE_URL), commands start the embedded server in your "
    "user data directory and stop it after. Exit codes: 0 done, 1 failed or a check did not hold, "
    "2 wrong usage, 3 database unreachable, 130 interrupted."
)


def build_app() -> typer.Typer:
    """The application with all commands."""
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

    for command in COMMANDS:
        app.command()(command)
    for name, (text, commands) in GROUPS.items():
        group = typer.Typer(help=text, no_args_is_help=True)
        for command in commands:
            group.command(command.__name__.rstrip("_"))(command)
        app.add_typer(group, name=name)
    return app


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


def _interrupted(error: BaseException | None) -> bool:
    """Whether this came of an interrupt: in the middle of a COPY even the rollback fails then."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _moved(words: list[str]) -> bool:
    """Say where a command of this name went; whether one did."""
    name = next((n for n in (" ".join(words[:1]), " ".join(words[:2])) if n in MOVED), None)
    if name is not None:
        common.note(f"There is no command '{name}' any more. {MOVED[name]}.")
    return name is not None


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    moved = _moved(sys.argv[1:] if arguments is None else arguments)
    return common.EXIT_USAGE if moved else _run(arguments)


def _run(arguments: list[str] | None) -> int:
    try:
        result = build_app()(args=arguments, standalone_mode=False)
        return result if isinstance(result, int) else common.EXIT_OK
    except KeyboardInterrupt:
        common.note("Interrupted.")
        return common.EXIT_INTERRUPTED
    except StepStoppedError as error:
        common.note(str(error))
        return common.EXIT_INTERRUPTED
    except SbertPgError as error:
        common.err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        common.err.print(f"[dim]Background: {error.page}[/]", highlight=False, soft_wrap=True)
        return common.EXIT_FAILED
    except sa.exc.DBAPIError as error:
        unreachable = isinstance(error, sa.exc.OperationalError)
        if unreachable and _interrupted(error):
            common.note("Interrupted.")
            return common.EXIT_INTERRUPTED
        common.err.print(f"[bold red]Database error[/]: {escape(str(error.orig).strip())}")
        return common.EXIT_UNREACHABLE if unreachable else common.EXIT_FAILED
    except Exception as error:
        return _from_elsewhere(error)


def _from_elsewhere(error: Exception) -> int:
    """What click raises without its standalone mode, and files that cannot be read or written."""
    if isinstance(error, OSError):
        common.err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        return common.EXIT_FAILED
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
