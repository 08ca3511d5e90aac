"""``tune``: an encoder fitted to labelled questions, written only where it is proven to be better.

What is proven is the gain of nDCG@k on questions that were kept back, against all rows. Its
interval is by bootstrap over groups of questions that share a document (Davison and Hinkley, 1997,
section 3.8), since these are right or wrong together.
"""

from __future__ import annotations

import shutil
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog.embedding import Embedding
from sbert_pg.distance import unit
from sbert_pg.errors import ConversionError, DeclarationError, needing
from sbert_pg.probes import SAMPLE_TEXTS
from sbert_pg.registry import get_encoder
from sbert_pg.spec import Vectors
from sbert_pg.tuning import adapters, whole
from sbert_pg.tuning.files import pairs_of, write_queries
from sbert_pg.tuning.pairs import HELD_OUT
from sbert_pg.tuning.task import Rows, Task, Tuning
from sbert_pg.types.comparator import base_of, clause_of

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

Method = Literal["linear", "contrastive", "full", "unlabelled", "distill"]
#: Rows that questions are ranked against, with the vectors that they have; and where they have to
#: be encoded. Of a larger table a sample, labelled rows in any case.
MOST_ROWS, MOST_ENCODED = 50_000, 10_000
#: Questions that are used; more of them say nothing new about a matrix.
MOST_QUESTIONS = 20_000
#: How far a folded query may be from what the matrix says, as a share of its length.
_ROUNDING = 1e-4
#: What a matrix for queries can learn to please: the length of a query plays no part in these.
_SIMILARITIES = ("cosine", "dot")


def tune(
    engine: sa.Engine,
    column: Any,
    pairs: Any,
    *,
    out: Path | str,
    method: Method = "linear",
    base: Path | str | None = None,
    epochs: int | None = None,
    matryoshka: Sequence[int] = (),
    where: Sequence[sa.ColumnElement[bool]] = (),
    document: str | None = None,
    time: str | None = None,
    held_out: float = HELD_OUT,
    k: int = 10,
    seed: int = 0,
) -> Tuning:
    """Fit a column's encoder to labelled questions; write it where it is proven to be better.

    ``linear`` and ``contrastive`` change queries alone: documents keep their vectors, so the column
    accepts the new encoder as it is. The other methods train a model with sentence-transformers
    (extra ``train``), and what comes of it needs no torch; it goes into its own column. The
    same questions, rows and seed give the same encoder. Nothing is written unless the gain on
    questions kept back is above zero with 95 % confidence.

    Args:
        engine: where; nothing is changed there.
        column: the embedding column; its encoder is loaded.
        pairs: labelled questions, as for ``evaluate``; ``own_pairs`` takes them from the table. A
            gain of 0 names a row that is wrong, and is a hard negative.
        out: the new encoder's directory, which must not exist. The questions kept back are written
            beside it, as ``<out>-held-out.jsonl``; a trained model, as sentence-transformers keeps
            it, as ``<out>-torch``.
        method: ``"linear"`` (a ridge regression, seconds), ``"contrastive"`` (gradient steps),
            ``"full"`` (all weights, with mined hard negatives; minutes on a CPU), ``"unlabelled"``
            (the same, from questions that are made of the texts; the labelled ones judge), or
            ``"distill"`` (a smaller model learns the vectors of the column's encoder).
        base: ``full`` and ``unlabelled``: the model to train, a sentence-transformers directory or
            a name; by default what the column's encoder was made of. ``distill``: the smaller
            model; by default a static one of 256 dimensions, a vector for each token.
        epochs: passes of training; by default 1, for ``distill`` 2.
        matryoshka: fewer dimensions at which the vectors of ``full`` shall be good, too.
        where: criteria of the rows that questions are ranked against.
        document: an attribute of the pairs, or a column of the table, that says which document a
            row is a part of: rows of one document stay on one side of the split.
        time: an attribute of the pairs, or a column of the table, with the time by which questions
            are split: the latest are kept back.
        held_out: share of the questions to keep back, between 0 and 1; ``unlabelled`` keeps back
            all of them.
        k: rows of an answer that count.
        seed: of the split and of the order of learning.

    Raises:
        NoGainError: the interval of the gain includes zero.
        TooFewPairsError: there are too few questions or documents to learn and to judge by.
        DeclarationError: the column has no encoder that can be fitted, or the directory exists.
        MissingExtraError: the method needs torch, or ``onnx``, and it is not installed.
        LoadError: the pairs are not readable, or there are none.
    """
    from sbert_pg.encoder.directory import refuse_taken

    started = clock.perf_counter()
    place = Path(out)
    beside = place.with_name(f"{place.name}-held-out.jsonl")
    refuse_taken(place)
    refuse_taken(beside)
    _require_fitting(method, base, epochs, matryoshka, held_out)
    source = base_of(clause_of(column))
    encoder = _fitting_encoder(source)
    rows = Rows(engine, source, where, MOST_ROWS if method in adapters.METHODS else MOST_ENCODED)
    queries = rows.known(pairs_of(engine, pairs))
    if len(queries) > MOST_QUESTIONS:
        drawn = np.random.default_rng(seed).choice(len(queries), MOST_QUESTIONS, replace=False)
        queries = [queries[i] for i in np.sort(drawn)]
    if method == "unlabelled":
        held_out = 1.0
    split = rows.split(queries, document, time, held_out, seed)
    wrong = rows.negatives([queries[i] for i in split.learning])
    task = Task(
        rows=rows,
        encoder=encoder,
        place=place,
        queries=queries,
        split=split,
        candidates=rows.candidates({key for keys in wrong for key in keys}, seed),
        wrong=wrong,
        asked=encoder.encode_query([query.text for query in queries]),
        k=k,
        seed=seed,
    )
    if method in adapters.METHODS:
        tuning = _matrix(task, method)
    else:
        tuning = whole.fit(task, method, base, epochs, matryoshka)
    write_queries(beside, task.judged)
    return replace(tuning, pairs=str(beside), seconds=clock.perf_counter() - started)


def _require_fitting(
    method: str,
    base: Path | str | None,
    epochs: int | None,
    matryoshka: Sequence[int],
    held_out: float,
) -> None:
    """Refuse settings that the method does not have."""
    if method not in get_args(Method):
        raise DeclarationError(
            f"There is no method {method!r}; there are {', '.join(get_args(Method))}."
        )
    asked = {"base": base is not None, "epochs": epochs is not None, "matryoshka": bool(matryoshka)}
    lacking = {"distill": ("matryoshka",), **dict.fromkeys(adapters.METHODS, tuple(asked))}
    unknown = [name for name in lacking.get(method, ()) if asked[name]]
    if unknown:
        raise DeclarationError(
            f"Method {method!r} has no {', '.join(unknown)}: a matrix is learned in its own way, "
            "and a distilled model gives the vectors of the one it learns from."
        )
    if epochs is not None and epochs < 1:
        raise DeclarationError(f"epochs={epochs}: give a whole number from 1.")
    if not 0 < held_out < 1:
        raise DeclarationError(f"held_out={held_out}: give a share between 0 and 1.")


def _fitting_encoder(base: Any) -> Any:
    """The encoder of a column, where it can be fitted."""
    from sbert_pg.encoder import Encoder

    if not isinstance(getattr(base, "type", None), Embedding):
        raise DeclarationError(f"tune() was given {base!r}, which is no embedding column.")
    encoder = get_encoder(base.type.encoder)
    if not isinstance(encoder, Encoder):
        raise DeclarationError(
            f"The encoder of {base} is a {type(encoder).__name__}; only a converted one "
            "(Encoder.load) has a graph that a matrix can be folded into, and weights to train."
        )
    if encoder.spec.similarity not in _SIMILARITIES:
        raise DeclarationError(
            f"{encoder!r} compares by {encoder.spec.similarity!r}; encoders are fitted to "
            f"{' or '.join(_SIMILARITIES)} only."
        )
    return encoder


def _matrix(task: Task, method: Any) -> Tuning:
    """Learn a matrix for queries, and fold it into the encoder where it is proven."""
    asked = task.asked[task.split.learning]
    parts = task.split.parts(adapters.PARTS, task.seed)
    examples = adapters.examples_of(task.candidates, task.learning, asked, task.wrong, parts)
    learned = adapters.learn(method, examples, task.candidates, k=task.k, seed=task.seed)
    moved = adapters.apply(learned.matrix, task.asked[task.split.held_out])
    after = task.candidates.ndcg(moved, task.judged, task.k)
    spec = task.encoder.spec
    facts = {"method": method, "side": "query", "settings": learned.settings, "compared": spec.name}
    tuning = task.proof(spec, task.before, after, **facts)
    promised, plain = learned.validation
    tuning.require_gain(f"By cross-validation {plain:.3f} became {promised:.3f}. ")
    record = task.record(tuning, len(task.learning))
    adapt_queries(task.encoder, learned.matrix, task.place, training=record)
    return tuning


def adapt_queries(
    encoder: Encoder,
    matrix: npt.NDArray[np.floating[Any]],
    place: Path,
    *,
    training: Mapping[str, Any] | None = None,
) -> Encoder:
    """Write an encoder whose queries are multiplied by a matrix; its documents stay as they are.

    The graph gets a second output, the vector of a text as a query, which is ``matrix @ vector``,
    divided by its length where the encoder's own have length one, and behind layers for queries
    that there are already. All else stays, so a column of the encoder accepts the new one.
    """
    from sbert_pg.encoder import Encoder
    from sbert_pg.encoder import directory as converted
    from sbert_pg.encoder.layers import Dense, Layer, Normalize, layer_text

    converted.refuse_taken(place)
    manifest, width = encoder.manifest, encoder.dimensions
    if width != manifest.full_dimensions:
        raise DeclarationError(
            f"{encoder!r} is truncated from {manifest.full_dimensions} dimensions. Load it in all "
            "of them to fit layers for its queries."
        )
    weight = np.ascontiguousarray(matrix, dtype=np.float32)
    if weight.shape != (width, width) or not np.isfinite(weight).all():
        raise DeclarationError(
            f"The matrix has shape {weight.shape} or holds values that are not finite; expected "
            f"are finite values of shape {(width, width)}."
        )
    with needing("onnx", "convert", "fold a matrix into an encoder"):
        import onnx

        from sbert_pg.encoder.graph import add_query_output
        from sbert_pg.encoder.writer import save
    dense = Dense(width, width, "Identity", weight, None)
    layers: list[Layer] = [dense, Normalize()] if manifest.spec.normalized else [dense]
    query_layers = (*encoder.spec.query_layers, *map(layer_text, layers))
    spec = replace(encoder.spec, name=str(place), query_layers=query_layers)

    def write(folder: Path) -> None:
        for name in (converted.TOKENIZER, converted.PROBE_VECTORS):
            shutil.copyfile(encoder.directory / name, folder / name)
        model = onnx.load(encoder.directory / converted.MODEL)
        add_query_output(model, layers)
        save(model, folder / converted.MODEL)
        changed = replace(manifest, spec=spec, training=dict(training or {}))
        converted.write_manifest(folder, changed)
        _require_same(encoder, Encoder.open(folder), weight)

    with converted.locked(place):
        converted.publish(place, write)
    return Encoder.open(place)


def _require_same(before: Encoder, after: Encoder, weight: Vectors) -> None:
    """Refuse a folded encoder of which a vector is not what the first one and the matrix say."""
    texts = SAMPLE_TEXTS[:20]
    documents = after.encode_document(texts) - before.encode_document(texts)
    expected = before.encode_query(texts) @ weight.T
    if before.spec.normalized:
        expected = unit(expected)
    queries = after.encode_query(texts) - expected
    apart = max(
        float(np.linalg.norm(documents, axis=1).max()),
        float(np.linalg.norm(queries, axis=1).max() / np.linalg.norm(expected, axis=1).max()),
    )
    if not apart <= _ROUNDING:
        raise ConversionError(
            f"Folded into the graph, the matrix gives vectors that differ by {apart:.2g} from what "
            "it should give; nothing was written. Please report this with the encoder's name."
        )
