"""``encoder``: convert, show, choose; and what a name of one means."""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbert_pg import tuning as lib
from sbert_pg.cli import common
from sbert_pg.cli.target import embedding_or_texts, queries_of, resolve
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import bar
from sbert_pg.registry import find_named, get_encoder
from sbert_pg.spec import KNOWN_ENCODERS, EncoderSpec
from sbert_pg.tuning.limits import beside

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

_NAME = (
    "A directory or a hub name; ':fp32' after it asks for a precision (int8, bf16, fp32, fp16, "
    "fp32-plain)."
)
NameArgument = Annotated[str, typer.Argument(help=_NAME)]
_BUDGET = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)?")
_WITH_PRECISION = re.compile(r"(?P<name>.+):(?P<precision>(?:fp32|fp16|bf16|int8)[a-z0-9_-]*)")


def split_name(name: str) -> tuple[str, str | None]:
    """Name and precision of ``name`` or ``name:precision``."""
    match = _WITH_PRECISION.fullmatch(name)
    return (name, None) if match is None else (match["name"], match["precision"])


def convert(
    name: NameArgument,
    revision: Annotated[str | None, typer.Option(help="Revision of the hub repository.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The encoder's directory; it must not exist.")
    ] = None,
) -> None:
    """Convert a sentence-transformers model to ONNX, held against its own fp32 form.

    Into the cache, where it is not there yet, or into a directory. 'encoder show' says the rest.

    [b]sbert-pg encoder convert all-MiniLM-L6-v2[/]
    [b]sbert-pg encoder convert ./my-model -o /srv/encoders/my-model[/]
    """
    from sbert_pg.encoder import Encoder, prepare

    model, precision = split_name(name)
    with bar(f"converting {model}"):
        place = prepare(model, precision=precision, revision=revision, output=out)
    _print_facts(_facts(Encoder.open(place)), False)


def show(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help=f"{_NAME} Without it, the well-known ones; several for --speed and --limits.",
        ),
    ] = None,
    check: common.CheckOption = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure how fast each engine that is installed is.")
    ] = False,
    limits: Annotated[bool, typer.Option("--limits", help="Measure where it breaks.")] = False,
    texts: Annotated[
        str | None,
        typer.Option(
            help="With --limits, your own texts too: a file, one a line, or a table or column of "
            "the database."
        ),
    ] = None,
    database: common.DatabaseOption = None,
    json: common.JsonOption = False,
) -> None:
    """What an encoder is: dimensions, limits, prompts, fingerprint, agreement with fp32.

    With --check its probes are computed on this machine, and have to agree with the stored ones.

    --speed: tokens per second of one core's time. What is fastest is kept beside the encoder for
    this kind of processor, and used from then on; engine= and $SBERT_PG_ENGINE go before it.

    --limits: word order, negation, numbers, names, languages, length. On texts that come with the
    library and, where given, on your own.

    Without a name, the well-known encoders: "retrieval" is the mean nDCG@10 of MTEB's ten English
    retrieval tasks, "cost" the multiplications of a token, all-MiniLM-L6-v2 being 1. Any other
    sentence-transformers model can be used too.

    [b]sbert-pg encoder show[/]
    [b]sbert-pg encoder show all-MiniLM-L6-v2 --check[/]
    [b]sbert-pg encoder show all-MiniLM-L6-v2:int8 all-MiniLM-L6-v2:fp32 --speed[/]
    [b]sbert-pg encoder show all-MiniLM-L6-v2 ./models/other --limits --texts article[/]
    """
    _require_names(names or (), speed or limits, limits, texts)
    if not names:
        _show_known(json)
    elif limits:
        _show_limits(names, [] if texts is None else _own_texts(texts, database), json)
    elif speed:
        _show_speeds(names, json)
    else:
        _show_facts(names[0], check, json)


def _require_names(names: Sequence[str], measured: bool, limits: bool, texts: str | None) -> None:
    if texts is not None and not limits:
        raise DeclarationError("--texts are what limits are measured on: add --limits.")
    if measured and not names:
        raise DeclarationError("Name the encoder that is to be measured.")
    if len(names) > 1 and not measured:
        raise DeclarationError("Several encoders are seen side by side with --speed or --limits.")


def _show_facts(name: str, check: bool, json: bool) -> None:
    encoder = encoder_named(name)
    facts = _facts(encoder)
    if check:
        from sbert_pg.probes import PRECISION_MIN_COSINE, agreement_of

        agreement = agreement_of(encoder.recomputed_probes(), encoder.probe_vectors)
        facts["here"] = asdict(agreement)
    _print_facts(facts, json)
    if check and agreement.min_cosine < PRECISION_MIN_COSINE:
        common.note("This machine computes other vectors than the one that converted the encoder.")
        raise typer.Exit(common.EXIT_FAILED)


def _show_known(json: bool) -> None:
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


def _show_limits(names: Sequence[str], own: list[str], json: bool) -> None:
    with bar("measuring"):
        reports = [lib.limits_of(encoder_named(name), own) for name in names]
    if len(reports) == 1:
        common.show(reports[0], reports[0].to_json(), json)
    else:
        common.show(beside(reports), [report.to_json() for report in reports], json)


def _show_speeds(names: Sequence[str], json: bool) -> None:
    from sbert_pg.encoder.pipeline import fastest_of, measure

    measured: dict[str, dict[str, Any]] = {}
    with bar() as advance:
        for name in names:
            advance(f"measuring {name}")
            encoder = encoder_named(name)
            speeds = measure(encoder.directory, encoder.manifest)
            fastest = fastest_of(speeds) if speeds else encoder.engine
            measured[name] = {"fastest": fastest, "tokens_per_cpu_second": speeds}
            if not (speeds or json):
                common.note(
                    f"{fastest} is the only engine installed that runs "
                    f"{encoder.manifest.precision}. OpenVINO comes with: "
                    "pip install 'sbert-pg[openvino]'"
                )
    if json:
        common.print_json(measured[names[0]] if len(names) == 1 else measured)
        return
    _print_speeds(measured)


def _print_speeds(measured: dict[str, dict[str, Any]]) -> None:
    common.show_records(
        [
            ({"encoder": name} if len(measured) > 1 else {})
            | {"engine": engine, **{case: round(speed) for case, speed in each.items()}}
            | {"": "fastest" if engine == one["fastest"] else ""}
            for name, one in measured.items()
            for engine, each in one["tokens_per_cpu_second"].items()
        ],
        False,
    )


def _own_texts(texts: str, database: str | None) -> list[str]:
    """The texts of a file, a line each, or of a column of the database; there has to be one."""
    if Path(texts).is_file() or "/" in texts:
        try:
            lines = Path(texts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DeclarationError(f"--texts {texts} cannot be read: {error}.") from error
        own = [line for line in lines if line.strip()]
    else:
        with common.database(database) as engine, engine.connect() as connection:
            own = lib.own_texts(connection, resolve(connection, texts).column)
    if not own:
        raise DeclarationError(f"There is no text in {texts} that could be looked at.")
    return own


def choose(
    target: common.TargetArgument,
    pairs: common.PairsOption,
    encoder: common.EncodersOption = None,
    budget: Annotated[
        str | None, typer.Option(help="What encoding a question may take, as 2ms.")
    ] = None,
    database: common.DatabaseOption = None,
    where: common.WhereOption = None,
    json: common.JsonOption = False,
) -> None:
    """Which encoder should I use? Answered on a table's own texts and questions.

    Quality with intervals, speed on this machine, size, languages, limits, and what the change
    would cost. Of the encoders of --encoder, which may be repeated, or of all that have been
    converted on this machine; the column's own is always among them. A table that has no embedding
    column yet is named by its texts. Exits with 1 where none keeps to the budget.

    [b]sbert-pg encoder choose article --pairs pairs.csv --budget 2ms[/]
    [b]sbert-pg encoder choose article.title,body --pairs pairs.csv -e ./models/a -e ./models/b[/]
    """
    limit = None if budget is None else _milliseconds(budget)
    candidates = [encoder_named(name) for name in encoder or ()] or lib.local_encoders()
    with common.database(database) as engine:
        with engine.connect() as connection:
            columns = embedding_or_texts(connection, target)
        queries = queries_of(engine, pairs)
        with bar("measuring"):
            choice = lib.choose_encoder(
                engine, columns, queries, candidates, budget=limit, where=common.criteria(where)
            )
    common.show(choice, choice.to_json(), json)
    common.fail_if(choice.chosen is None)


def encoder_named(name: str) -> Encoder:
    """The encoder of ``name`` or ``name:precision``, converted now where it is not yet."""
    from sbert_pg.encoder import Encoder

    model, precision = split_name(name)
    return Encoder.load(model, precision=precision)


def spec_named(name: str) -> EncoderSpec:
    """What a class would declare for an encoder given by name; it is loaded where need be."""
    name, precision = split_name(name)
    try:
        spec = EncoderSpec.of(name)
    except DeclarationError:
        encoder = find_named(name)
        if encoder is None:
            # Kept by the registry only in the precision that columns of this declaration mean.
            encoder = encoder_named(f"{name}:{precision}") if precision else get_encoder(name)
        spec = EncoderSpec(
            name=name, dimensions=encoder.spec.dimensions, similarity=encoder.spec.similarity
        )
    return replace(spec, precision=precision) if precision else spec


def _facts(encoder: Encoder) -> dict[str, Any]:
    spec, manifest = encoder.spec, encoder.manifest
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
        "megabytes": round(encoder.megabytes, 1),
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


def _milliseconds(text: str) -> float:
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise DeclarationError(f"--budget {text!r}: give milliseconds or seconds, as 2ms or 0.5s.")
    return float(match[1]) * (1000 if match[2] == "s" else 1)
