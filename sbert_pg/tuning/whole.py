"""``full``, ``unlabelled`` and ``distill``: encoders whose documents get other vectors.

A model is trained by sentence-transformers, converted as any other, and judged in the form that it
is deployed in: the labelled rows and the questions kept back are encoded without torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DeclarationError, EncoderNotFoundError
from sbert_pg.spec import Vectors
from sbert_pg.tuning import training
from sbert_pg.tuning.adapters import Candidates
from sbert_pg.tuning.task import Task, Tuning

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

#: Passes of training, where nothing is said.
EPOCHS = {"full": 1, "unlabelled": 1, "distill": 2}
#: Dimensions of a static student.
STATIC_DIMENSIONS = 256
#: Texts, and parts of them of so many words, that are learned from without labels.
MOST_TEXTS, MOST_PARTS, _WORDS = 10_000, 20_000, 60
#: Texts by which speed is measured, and times; the fastest counts.
_TIMED, _TIMES = 100, 3
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
#: Words that a sentence needs to ask for the rest of its text.
_LEAST_WORDS = 4


def fit(
    task: Task, method: str, base: Path | str | None, epochs: int | None, matryoshka: Sequence[int]
) -> Tuning:
    """Train a model, convert it, and write it where it is proven; arguments as for ``tune``."""
    from sbert_pg.encoder import directory as converted

    passes, place = epochs or EPOCHS[method], task.place
    # Who comes second waits, and is refused what is there by then.
    with converted.locked(place), converted.scratch(place, ".training-") as folder:
        for taken in (place, kept_model(place)):
            converted.refuse_taken(taken)
        trained = folder / "model"
        if method == "distill":
            return _distill(task, trained, base, passes)
        source = _source(task.encoder, base)
        examples = _labelled(task) if method == "full" else _unlabelled(task)
        settings = training.train(
            source, trained, examples, epochs=passes, matryoshka=matryoshka, seed=task.seed
        )
        name = task.encoder.spec.name
        settings = {"base": str(base or name), **settings}
        facts = {"method": method, "settings": settings, "compared": name}
        return _publish(task, trained, task.before, len(examples), facts)


def kept_model(place: Path) -> Path:
    """Where the trained model of an encoder is kept, as sentence-transformers reads it."""
    return place.with_name(f"{place.name}-torch")


def _source(encoder: Encoder, base: Path | str | None) -> Path:
    """The directory of the model to train."""
    from sbert_pg.encoder.directory import is_converted
    from sbert_pg.encoder.hub import find, home_of

    name = str(base or encoder.spec.name)
    path = home_of(name)
    if not is_converted(path):
        return find(name).path
    if kept_model(path).is_dir():
        return kept_model(path)
    raise EncoderNotFoundError(
        f"{path} is a converted encoder, without the weights that training needs. Give the model "
        "that it was made of as base: a sentence-transformers directory or a name."
    )


def _labelled(task: Task) -> list[training.Example]:
    """The questions to learn from, with an answer each and its hard negatives."""
    keys = {key for keys in task.wrong for key in keys}
    texts = task.rows.texts(keys | {key for query in task.learning for key in query.gains})
    groups = task.split.groups[task.split.learning]
    return [
        training.Example(
            query.text, texts[key], [texts[k] for k in wrong if k in texts], int(group)
        )
        for query, wrong, group in zip(task.learning, task.wrong, groups, strict=True)
        for key in query.gains
        if key in texts
    ]


def _texts(task: Task) -> list[str]:
    """Different texts of the table, some of them where there are many."""
    keys = list(task.candidates.keys)
    if len(keys) > MOST_TEXTS:
        drawn = np.random.default_rng(task.seed).choice(len(keys), MOST_TEXTS, replace=False)
        keys = [keys[i] for i in drawn]
    return sorted(set(task.rows.texts(keys).values()))


def _unlabelled(task: Task) -> list[training.Example]:
    """Questions without labels: a sentence of a text asks for the rest (Lee et al., 2019)."""
    random = np.random.default_rng(task.seed)
    examples = []
    for number, text in enumerate(_texts(task)):
        sentences = _SENTENCE.split(text.strip())
        asking = [i for i, said in enumerate(sentences) if len(said.split()) >= _LEAST_WORDS]
        if len(sentences) < 2 or not asking:
            continue
        chosen = asking[random.integers(len(asking))]
        rest = " ".join(sentences[:chosen] + sentences[chosen + 1 :])
        examples.append(training.Example(sentences[chosen], rest, (), number))
    if len(examples) < training.BATCH:
        raise DeclarationError(
            f"Only {len(examples)} texts of {task.rows.name} have two sentences and more, of which "
            "one could ask for the others. Learn from labelled questions (method='full')."
        )
    return examples


def _distill(task: Task, trained: Path, base: Path | str | None, passes: int) -> Tuning:
    """Have a smaller model learn the vectors of the column's encoder, on the table's own texts."""
    from sbert_pg.encoder import Encoder, prepare

    texts = [*_parts(task), *(query.text for query in task.learning)]
    vectors = task.encoder.encode_document(texts)
    first, plain = trained.with_name("student"), trained.with_name("plain")
    if base is None:
        turned = _leading(vectors, STATIC_DIMENSIONS)
        source: Any = _static_source(task.encoder, turned)
        training.distil(source, plain, [], vectors, epochs=0)
    else:
        source = plain = _source(task.encoder, base)
    student = Encoder.open(
        prepare(str(plain), precision=task.encoder.manifest.precision, output=first)
    )
    width = student.manifest.full_dimensions
    if width > vectors.shape[1]:
        raise DeclarationError(
            f"{base} has {width} dimensions and the encoder of {task.rows.name} has "
            f"{vectors.shape[1]}: a student has as many or fewer."
        )
    targets = np.ascontiguousarray(vectors @ _leading(vectors, width), np.float32)
    settings = training.distil(source, trained, texts, targets, epochs=passes, seed=task.seed)
    own = task.figures(task.before, task.before)[0]
    facts = {
        "method": "distill",
        "settings": {"base": str(base or "static"), **settings},
        "compared": str(base or "the vectors of its tokens"),
        "notes": {f"nDCG@{task.k} of the column's own encoder": str(own)},
    }
    return _publish(task, trained, _ndcg(task, student), len(texts), facts)


def _parts(task: Task) -> list[str]:
    """The texts in parts that model and student both read as a whole."""
    parts = []
    for text in _texts(task):
        words = text.split()
        parts += [" ".join(words[i : i + _WORDS]) for i in range(0, len(words), _WORDS)]
    parts = sorted(set(parts))
    if len(parts) > MOST_PARTS:
        drawn = np.random.default_rng(task.seed).choice(len(parts), MOST_PARTS, replace=False)
        parts = [parts[i] for i in drawn]
    return parts


def _leading(vectors: Vectors, width: int) -> Vectors:
    """Orthogonal axes along which vectors are longest, ``(dimensions, width)``.

    As many as there are dimensions: none are turned, so that the student shares their space.
    """
    full = vectors.shape[1]
    if width >= full:
        return np.eye(full, dtype=np.float32)
    axes = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)[1]
    return np.asarray(axes[:, ::-1][:, :width], np.float32)


def _static_source(encoder: Encoder, axes: Vectors) -> tuple[Path, Vectors]:
    """Tokenizer, and the encoder's own vector of each token to begin with."""
    from tokenizers import Tokenizer

    path = encoder.directory / "tokenizer.json"
    vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        names[number] = token
    # As they stand within words, without the marks of where a word begins.
    said = [name.removeprefix("##").strip("▁Ġ") or name or "." for name in names]
    return path, np.ascontiguousarray(encoder.encode_document(said) @ axes)


def _publish(
    task: Task,
    trained: Path,
    before: npt.NDArray[np.float64],
    examples: int,
    facts: Mapping[str, Any],
) -> Tuning:
    """Convert a trained model, judge it, and put both where they belong if it is proven."""
    from sbert_pg.encoder import Encoder
    from sbert_pg.encoder import directory as converted
    from sbert_pg.encoder.conversion import convert
    from sbert_pg.encoder.hub import ModelFiles

    place, results = task.place, []

    def write(folder: Path) -> None:
        manifest = convert(folder, ModelFiles(trained), str(place), task.encoder.manifest.precision)
        encoder = Encoder.open(folder)
        cut = _cut(task, encoder, facts["settings"].get("matryoshka", ()))
        notes = {**facts.get("notes", {}), **cut}
        after = _ndcg(task, encoder)
        own = {**facts, "side": "both", "notes": notes}
        results.append(task.proof(encoder.spec, before, after, **own))
        results[0].require_gain()
        record = task.record(results[0], examples)
        converted.write_manifest(folder, replace(manifest, training=record))

    converted.publish(place, write)
    trained.rename(kept_model(place))
    (tuning,) = results
    # Speed is this machine's and no fact of the encoder, so the record has none of it.
    return replace(tuning, notes={**tuning.notes, **_speeds(task, Encoder.open(place))})


def _ndcg(task: Task, encoder: Encoder) -> npt.NDArray[np.float64]:
    """nDCG@k of each question kept back, rows and questions encoded by an encoder."""
    keys = list(task.candidates.keys)
    texts = task.rows.texts(keys)
    keys = [key for key in keys if key in texts]
    vectors = encoder.encode_document([texts[key] for key in keys])
    asked = encoder.encode_query([query.text for query in task.judged])
    rows = Candidates(keys, vectors, encoder.spec.similarity)
    return rows.ndcg(asked, task.judged, task.k)


def _cut(task: Task, encoder: Encoder, widths: Sequence[int]) -> dict[str, str]:
    """nDCG@k at the fewer dimensions that were trained for."""
    notes = {}
    for width in widths:
        after = _ndcg(task, type(encoder).open(encoder.directory, dimensions=width))
        notes[f"nDCG@{task.k} at {width} dimensions"] = str(task.figures(after, after)[0])
    return notes


def _speeds(task: Task, encoder: Encoder) -> dict[str, str]:
    """Texts a second and size, beside the column's own encoder."""
    texts = list(task.rows.texts(list(task.candidates.keys)[:_TIMED]).values())
    both = (task.encoder, encoder)
    best = [float("inf")] * 2
    for _ in range(_TIMES):
        for i, each in enumerate(both):
            started = time.perf_counter()
            each.encode_document(texts)
            best[i] = min(best[i], time.perf_counter() - started)
    return {
        "speed": f"{best[0] / best[1]:.2f} times the texts a second of {task.encoder.spec.name}",
        "megabytes": f"{encoder.megabytes:.1f}, before {task.encoder.megabytes:.1f}",
    }
