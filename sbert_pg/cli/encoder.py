"""``encoder``: list, convert, show, compare."""

from __future__ import annotations

import csv
import json as json_module
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import bar
from sbert_pg.spec import KNOWN_ENCODERS

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder
    from sbert_pg.spec import EncoderSpec

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A directory or a hub name; ':fp32' after it asks for a precision "
        "(int8, bf16, fp32, fp16, fp32-plain).",
        show_default=False,
    ),
]
#: Rows of texts that a comparison uses.
MOST_ROWS = 5_000
_WITH_PRECISION = re.compile(r"(?P<name>.+):(?P<precision>(?:fp32|fp16|bf16|int8)[a-z0-9_-]*)")


def split_name(name: str) -> tuple[str, str | None]:
    """Name and precision of ``name`` or ``name:precision``."""
    match = _WITH_PRECISION.fullmatch(name)
    return (name, None) if match is None else (match["name"], match["precision"])


def convert(
    name: NameArgument,
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

    model, precision = split_name(name)
    if output is not None and output.exists() and not again:
        raise DeclarationError(f"{output} is there already; remove it, or pass --again.")
    with bar(f"converting {model}"):
        place = prepare(model, precision=precision, revision=revision, output=output, again=again)
    _print_facts(_facts(Encoder.open(place)), json)


def list_(json: common.JsonOption = False) -> None:
    """Well-known encoders: width, limit, languages, licence, how well they retrieve, their cost.

    "retrieval" is the mean nDCG@10 of MTEB's ten English retrieval tasks, "cost" the
    multiplications of a token, all-MiniLM-L6-v2 being 1. Any other sentence-transformers model can
    be used too.

    [b]sbert-pg encoder list[/]
    """
    if json:
        common.print_json([asdict(known) for known in KNOWN_ENCODERS])
        return
    common.print_rows(
        ["name", "dimensions", "tokens", "languages", "licence", "M parameters", "retrieval",
         "cost", "good for"],
        [
            [k.name, f"{k.dimensions} or fewer" if k.matryoshka else k.dimensions,
             k.max_seq_length or "any", k.languages, k.licence, k.parameters,
             k.retrieval or "-", k.cost, k.good_for]
            for k in KNOWN_ENCODERS
        ],
    )  # fmt: skip


def show(
    name: NameArgument,
    check: common.CheckOption = False,
    json: common.JsonOption = False,
) -> None:
    """What an encoder is: dimensions, limits, prompts, fingerprint, agreement with fp32.

    With --check its probes are computed on this machine, and have to agree with the stored ones.

    [b]sbert-pg encoder show all-MiniLM-L6-v2 --check[/]
    """
    encoder = _load(name)
    facts = _facts(encoder)
    if check:
        from sbert_pg.probes import PRECISION_MIN_COSINE, agreement_of

        agreement = agreement_of(encoder.recomputed_probes(), encoder.probe_vectors)
        facts["here"] = asdict(agreement)
    _print_facts(facts, json)
    if check and agreement.min_cosine < PRECISION_MIN_COSINE:
        common.note("This machine computes other vectors than the one that converted the encoder.")
        raise typer.Exit(common.EXIT_FAILED)


def measure(name: NameArgument, json: common.JsonOption = False) -> None:
    """How fast each engine that is installed runs it here; the fastest is used from then on.

    In tokens per second of one core's time. What is fastest is kept beside the encoder for this
    kind of processor; engine= and $SBERT_PG_ENGINE go before it.

    [b]sbert-pg encoder measure all-MiniLM-L6-v2[/]
    """
    from sbert_pg.encoder.measuring import fastest_of
    from sbert_pg.encoder.measuring import measure as measure_engines

    with bar(f"measuring {name}"):
        encoder = _load(name)
        speeds = measure_engines(encoder.directory, encoder.manifest)
    fastest = fastest_of(speeds) if speeds else encoder.engine
    if json:
        common.print_json({"fastest": fastest, "tokens_per_cpu_second": speeds})
        return
    if not speeds:
        common.note(
            f"{fastest} is the only engine installed that runs {encoder.manifest.precision}. "
            "OpenVINO comes with: pip install 'sbert-pg[openvino]'"
        )
        return
    cases = list(next(iter(speeds.values())))
    common.print_table(
        ["engine", *cases, ""],
        [
            [name, *(round(each[case]) for case in cases), "fastest" if name == fastest else ""]
            for name, each in speeds.items()
        ],
    )


def compare(
    names: Annotated[list[str], typer.Argument(help="Two or more encoders, as NAME or NAME:fp32.")],
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            help="A header and rows of two texts (question, answer), or of two texts and a score, "
            "larger for more alike.",
            show_default=False,
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="SQL that gives such columns.", show_default=False)
    ] = None,
    database: common.DatabaseOption = None,
    json: common.JsonOption = False,
) -> None:
    """Which encoder should I use? Quality and speed on your own texts, side by side.

    At most 5,000 rows are used.

    [b]sbert-pg encoder compare all-MiniLM-L6-v2 all-MiniLM-L6-v2:fp32 --csv pairs.csv[/]
    [b]sbert-pg encoder compare a b --query "SELECT question, answer FROM faq"[/]
    """
    if (csv_file is None) == (query is None):
        raise DeclarationError("Give the texts by one of --csv and --query.")
    rows = _rows_of(csv_file) if csv_file is not None else _rows(query or "", database)
    from sbert_pg.encoder.quality import compare_on_pairs, compare_on_questions

    results = []
    for name in names:
        with bar(f"{name}: loading and encoding"):
            encoder = _load(name)
            if len(rows[0]) == 3:
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


def _load(name: str) -> Encoder:
    from sbert_pg.encoder import Encoder

    model, precision = split_name(name)
    return Encoder.load(model, precision=precision)


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
        "prompt_of_documents": spec.document_prompt or _no_prompt(spec),
        "default_prompt_name": spec.default_prompt_name,
        "precision": manifest.precision,
        "engine": encoder.engine,
        "exporter": manifest.exporter,
        "revision": spec.revision,
        "fingerprint": spec.fingerprint,
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "agreement": {name: asdict(value) for name, value in manifest.agreement.items()},
    }


def _no_prompt(spec: EncoderSpec) -> str:
    """Documents get the prompt ``document`` and no other, as in sentence-transformers."""
    others = sorted({name for name, _ in spec.prompts} & {"passage", "corpus"})
    return f"none: {', '.join(others)} only where it is asked for by name" if others else "none"


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


def _rows_of(path: Path) -> list[tuple[Any, ...]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [tuple(row) for row in islice(reader, MOST_ROWS) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DeclarationError(f"{path} cannot be read: {error}.") from error
    return _checked(rows, len(header), str(path))


def _rows(query: str, database: str | None) -> list[tuple[Any, ...]]:
    import sqlalchemy as sa

    with common.database(database) as engine, engine.connect() as connection:
        result = connection.execute(sa.text(query))
        rows = [tuple(row) for row in result.fetchmany(MOST_ROWS)]
        return _checked(rows, len(result.keys()), "The query")


def _checked(rows: list[tuple[Any, ...]], width: int, where: str) -> list[tuple[Any, ...]]:
    if width not in (2, 3) or not rows or any(len(row) != width for row in rows):
        raise DeclarationError(
            f"{where} gives {len(rows)} rows of {width} columns; expected are a header and rows of "
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
