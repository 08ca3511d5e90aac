"""``encoder``: convert, show, encode, compare, bench, list."""

from __future__ import annotations

import csv
import json as json_module
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError
from sbert_pg.known import KNOWN_ENCODERS

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A directory or a hub name; ':fp32' after it asks for a precision.",
        show_default=False,
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        help="int8 (the default), int8-blocks, fp32, fp16 or fp32-plain.", show_default=False
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads of inference; all that the process may use by default.")
]
_WITH_PRECISION = re.compile(r"^(?P<name>.+):(?P<precision>(?:fp32|fp16|int8)[a-z0-9_-]*)$")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Convert, look at and compare encoders.", no_args_is_help=True)
    for command in (convert, show, encode, compare, bench):
        group.command()(command)
    group.command("list")(list_known)
    app.add_typer(group, name="encoder")


def split_name(name: str, precision: str | None = None) -> tuple[str, str | None]:
    """Name and precision of ``name`` or ``name:precision``."""
    found = _WITH_PRECISION.match(name)
    if found is None:
        return name, precision
    return found["name"], precision or found["precision"]


def convert(
    name: NameArgument,
    precision: PrecisionOption = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of the hub repository.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to make; the cache by default."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Convert even what is there.")] = False,
    json: common.JsonOption = False,
) -> None:
    """Convert a sentence-transformers model to ONNX, held against its own fp32 form.

    [b]sbert-pg encoder convert all-MiniLM-L6-v2[/]
    [b]sbert-pg encoder convert ./my-model -o /srv/encoders/my-model[/]
    """
    from sbert_pg.encoder import Encoder, prepare

    wanted, precision = split_name(name, precision)
    if output is not None and output.exists() and not again:
        raise DeclarationError(f"{output} is there already; remove it, or pass --again.")
    place = prepare(wanted, precision=precision, revision=revision, output=output, again=again)
    _print_facts(_facts(Encoder.open(place)), json)


def show(
    name: NameArgument,
    precision: PrecisionOption = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compute the probes anew on this machine; exit 1 where they disagree."
        ),
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """What an encoder is: dimensions, limits, prompts, fingerprint, agreement with fp32.

    [b]sbert-pg encoder show all-MiniLM-L6-v2[/]
    """
    encoder = _load(name, precision)
    facts = _facts(encoder)
    if verify:
        from sbert_pg.probes import PRECISION_MIN_COSINE, agreement_of

        agreement = agreement_of(encoder.recomputed_probes(), encoder.probe_vectors)
        facts["here"] = asdict(agreement)
    _print_facts(facts, json)
    if verify and agreement.min_cosine < PRECISION_MIN_COSINE:
        common.note("This machine computes other vectors than the one that converted the encoder.")
        raise typer.Exit(common.EXIT_FAILED)


def encode(
    name: NameArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; one a line of standard input where none is given."),
    ] = None,
    precision: PrecisionOption = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt to use: 'query', 'document', or the model's own.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep the first dimensions of a Matryoshka model.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write one float32 array to this .npy file."),
    ] = None,
) -> None:
    """Print the vectors of texts, one JSON list a line.

    [b]sbert-pg encoder encode all-MiniLM-L6-v2 "a text" "another"[/]
    [b]sbert-pg encoder encode all-MiniLM-L6-v2 -o titles.npy < titles.txt[/]
    """
    import numpy as np

    encoder = _load(name, precision, dimensions=dimensions)
    given = texts or (line.rstrip("\n") for line in sys.stdin)
    vectors = encoder.encode_stream(given, prompt_name=prompt_name)
    if output is not None:
        rows = list(vectors)
        np.save(output, np.stack(rows) if rows else np.empty((0, encoder.dimensions), np.float32))
        common.note(f"{len(rows)} vectors of {encoder.dimensions} dimensions in {output}.")
    else:
        for vector in vectors:
            sys.stdout.write(json_module.dumps([round(float(x), 7) for x in vector]) + "\n")
    if encoder.statistics.truncated:
        common.note(
            f"{encoder.statistics.truncated} texts were longer than {encoder.max_seq_length} "
            "tokens and were cut."
        )


def compare(
    names: Annotated[list[str], typer.Argument(help="Two or more encoders, as NAME or NAME:fp32.")],
    pairs: Annotated[
        Path | None,
        typer.Option(help="CSV: two texts and a score, larger for more alike.", show_default=False),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="CSV: a question and the text that answers it.", show_default=False),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="SQL that gives two texts (question, answer), or three columns with a score.",
            show_default=False,
        ),
    ] = None,
    database: common.DatabaseOption = None,
    limit: Annotated[int, typer.Option(help="Rows to use at most.")] = 5000,
    json: common.JsonOption = False,
) -> None:
    """Which encoder should I use? Quality and speed on your own texts, side by side.

    [b]sbert-pg encoder compare all-MiniLM-L6-v2 all-MiniLM-L6-v2:fp32 --pairs pairs.csv[/]
    [b]sbert-pg encoder compare all-MiniLM-L6-v2 ./mine --questions faq.csv[/]
    [b]sbert-pg encoder compare a b --query "SELECT question, answer FROM faq"[/]
    """
    if sum(given is not None for given in (pairs, questions, query)) != 1:
        raise DeclarationError("Give the texts by exactly one of --pairs, --questions and --query.")
    rows = _rows(pairs or questions, query, database, limit)
    scored = pairs is not None or (query is not None and len(rows[0]) == 3)
    if pairs is not None and len(rows[0]) != 3:
        raise DeclarationError(f"{pairs} has to have three columns: two texts and a score.")
    from sbert_pg.encoder.comparing import compare_on_pairs, compare_on_questions

    results = []
    for name in names:
        common.note(f"{name}: loading and encoding")
        encoder = _load(name, None)
        if scored:
            results.append(compare_on_pairs(name, encoder, _scored(rows)))
        else:
            results.append(compare_on_questions(name, encoder, [(r[0], r[1]) for r in rows]))
    if json:
        common.print_json(results)
        return
    columns = list(results[0])
    common.print_table(
        columns,
        [[_shown(result[column]) for column in columns] for result in results],
        title=f"{len(rows)} rows",
    )


def bench(
    name: NameArgument,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(help="Time for each measurement.")] = 2.0,
    json: common.JsonOption = False,
) -> None:
    """How fast an encoder is on this machine: throughput by length of text, latency of a query.

    [b]sbert-pg encoder bench all-MiniLM-L6-v2 --threads 1[/]
    """
    from sbert_pg.encoder.comparing import measure_speed

    encoder = _load(name, precision, threads=threads)
    results = measure_speed(encoder, seconds)
    if json:
        common.print_json(results)
        return
    common.print_table(
        ["texts", "tokens a text", "texts/s", "tokens/s"],
        [
            [row["texts"], _shown(row["tokens_per_text"]), _shown(row["texts_per_s"]),
             _shown(row["tokens_per_s"])]
            for row in results["throughput"]
        ],
        title=f"{name} in {encoder.manifest.precision}",
    )  # fmt: skip
    common.out.print(
        f"one query: p50 {results['query_ms']['p50']:.2f} ms, p95 {results['query_ms']['p95']:.2f} "
        "ms",
        highlight=False,
    )


def list_known(json: common.JsonOption = False) -> None:
    """Well-known encoders, with their sizes and limits and what each is good for.

    [b]sbert-pg encoder list[/]
    """
    if json:
        common.print_json([asdict(known) for known in KNOWN_ENCODERS])
        return
    common.print_table(
        ["name", "dimensions", "tokens", "languages", "similarity", "M parameters", "good for"],
        [
            [k.name, k.dimensions, k.max_seq_length, k.languages, k.similarity, k.parameters,
             k.good_for]
            for k in KNOWN_ENCODERS
        ],
    )  # fmt: skip


def _load(
    name: str,
    precision: str | None,
    *,
    dimensions: int | None = None,
    threads: int | None = None,
) -> Encoder:
    from sbert_pg.encoder import Encoder

    wanted, precision = split_name(name, precision)
    return Encoder.load(wanted, precision=precision, dimensions=dimensions, threads=threads)


def _facts(encoder: Encoder) -> dict[str, Any]:
    spec, manifest = encoder.spec, encoder.manifest
    files = [encoder.directory / name for name in manifest.files]
    return {
        "name": spec.name,
        "directory": str(encoder.directory),
        "dimensions": spec.dimensions,
        "max_seq_length": spec.max_seq_length,
        "similarity": spec.similarity,
        "normalized": spec.normalized,
        "pooling": spec.pooling,
        "layers": list(spec.layers),
        "prompts": dict(spec.prompts),
        "default_prompt_name": spec.default_prompt_name,
        "precision": manifest.precision,
        "exporter": manifest.exporter,
        "revision": spec.revision,
        "fingerprint": spec.fingerprint,
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "agreement": {name: asdict(value) for name, value in manifest.agreement.items()},
    }


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        common.print_json(facts)
        return
    shown = []
    for name, value in facts.items():
        if name in ("agreement", "here"):
            continue
        if isinstance(value, (list, dict)):
            value = json_module.dumps(value, ensure_ascii=False) if value else "none"
        shown.append([name, str(value)])
    for name, value in facts["agreement"].items():
        shown.append([f"agreement with fp32, {name}", _agreement(value)])
    if "here" in facts:
        shown.append(["probes on this machine", _agreement(facts["here"])])
    common.print_table(["", ""], shown)


def _agreement(value: dict[str, float]) -> str:
    return f"cosine mean {value['mean_cosine']:.5f}, min {value['min_cosine']:.5f}"


def _rows(
    path: Path | None, query: str | None, database: str | None, limit: int
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]]
    if path is not None:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                header = next(reader, None)
                rows = [tuple(row) for _, row in zip(range(limit), reader, strict=False) if row]
        except OSError as error:
            raise DeclarationError(f"{path} cannot be read: {error}.") from error
        where, width = str(path), len(header or [])
    else:
        import sqlalchemy as sa

        with common.database(database) as engine, engine.connect() as connection:
            result = connection.execute(sa.text(query or ""))
            rows = [tuple(row) for row in result.fetchmany(limit)]
            where, width = "The query", len(result.keys())
    if width not in (2, 3) or not rows or any(len(row) != width for row in rows):
        raise DeclarationError(
            f"{where} gives {len(rows)} rows of {width} columns; wanted are a header and rows of "
            "two texts, or of two texts and a score."
        )
    return [tuple("" if value is None else value for value in row) for row in rows]


def _scored(rows: Sequence[tuple[Any, ...]]) -> list[tuple[str, str, float]]:
    try:
        return [(str(a), str(b), float(score)) for a, b, score in rows]
    except ValueError as error:
        raise DeclarationError(f"The third column has to hold numbers: {error}.") from error


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if value < 10 else round(value)
    return value
