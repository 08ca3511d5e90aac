"""``adopt``: bind a column of vectors that somebody else made."""

from __future__ import annotations

from typing import Annotated

import typer

from sbert_pg import reembedding as lib
from sbert_pg.cli import changing, common
from sbert_pg.cli.changing import SEPARATOR, SeparatorOption, TemplateOption
from sbert_pg.cli.worker import ImportOption, prepare
from sbert_pg.errors import NotProvenError
from sbert_pg.registry import get_encoder
from sbert_pg.source import Source


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(adopt)


def adopt(
    column: Annotated[
        str, typer.Argument(help="The vector column, as table.column or schema.table.column.")
    ],
    encoder: Annotated[
        list[str],
        typer.Option(
            "--encoder",
            "-e",
            help="An encoder that may have made the vectors; ':fp32' after it asks for a "
            "precision. May be repeated.",
        ),
    ],
    database: common.DatabaseOption = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            "-s",
            help="A column that the text was made of; found by trying by default. May be repeated.",
            show_default=False,
        ),
    ] = None,
    separator: SeparatorOption = SEPARATOR,
    template: TemplateOption = None,
    sample: Annotated[int, typer.Option(help="Rows to encode again.", min=1)] = 200,
    min_share: Annotated[
        float, typer.Option(help="Least share of them that has to agree.", min=0, max=1)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Another seed samples other rows.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Prove only; change nothing.")] = False,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """Bind existing vectors to the encoder and source that are proven to have made them.

    Nothing is computed anew but a sample. Rows of it that do not agree are listed, and become
    pending; sbert-pg audit looks at all rows. Exits with 1, and binds nothing, without proof.

    [b]sbert-pg adopt article.embedding -e all-MiniLM-L6-v2[/]
    [b]sbert-pg adopt article.embedding -e all-MiniLM-L6-v2 -s title -s body --check[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    identity = changing.unbound(column)
    given = changing.source_of(source, separator, template)
    sources = None if given is None else [given]
    encoders = [get_encoder(changing.spec_of(name)) for name in encoder]
    with common.database(database) as engine:
        proof = lib.examine(
            engine, identity, encoders, sources, sample=sample, min_share=min_share, seed=seed
        )
        pending = None
        if proof.proven and not check:
            done = lib.adopt(
                engine, identity, encoders, sources, sample=sample, min_share=min_share, seed=seed
            )
            proof, pending = done.proof, done.pending
    if json:
        common.print_json(
            {**proof.to_json(), "adopted": pending is not None, "pending": pending or 0}
        )
    else:
        common.out.print(str(proof), highlight=False, markup=False, soft_wrap=True)
    if not proof.proven:
        raise NotProvenError("The column is not adopted, and nothing was changed.")
    if pending is not None and not json:
        common.note(f"Adopted; {pending:,} doubtful rows are pending. Declare it as:")
        common.out.print(_declaration(proof), highlight=False, markup=False, soft_wrap=True)


def _declaration(proof: lib.Proof) -> str:
    assert proof.best is not None
    assert proof.source is not None
    return (
        f"    {proof.column} = embedding_column({proof.best.encoder!r}, "
        f"source={_written(proof.source)}, nullable=True)"
    )


def _written(source: Source) -> str:
    if source.pattern is not None:
        return f"Source.template({source.pattern!r})"
    if len(source.columns) == 1:
        return repr(source.columns[0])
    if source.separator == SEPARATOR:
        return repr(list(source.columns))
    return f"Source({source.columns!r}, separator={source.separator!r})"
