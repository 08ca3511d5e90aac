"""Encoders trained whole: a tiny model learns a cipher in seconds. Torch trains, and never runs."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import load_file, save_file
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tiny_model import WORDS, edit, write_tiny

from sbert_pg import create_all, embed_rows, tune, use_encoder
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.encoder import Encoder
from sbert_pg.errors import (
    DeclarationError,
    EncoderNotFoundError,
    MissingExtraError,
    NoGainError,
)
from sbert_pg.spec import EncoderSpec
from sbert_pg.tuning import training, whole

# By what is installed: an import takes seconds, also where none of these tests is asked for.
pytestmark = pytest.mark.skipif(
    not list(importlib.metadata.distributions(name="sentence-transformers")),
    reason="the extra 'train' is not installed",
)

#: A text is three letters of the first half; its question the letters 13 places on.
LETTERS = "abcdefghijklm"
TINY = EncoderSpec(name="tiny", dimensions=6)
TEXTS = list(itertools.combinations(LETTERS, 3))


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding: Mapped[Any] = mapped_column(Embedding(TINY, "body"))


def asked(text: tuple[str, ...]) -> str:
    return " ".join(chr(ord(letter) + 13) for letter in reversed(text))


PAIRS = [(asked(text), n) for n, text in enumerate(TEXTS, start=1)]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rates for a model of 8 dimensions; and one thread, since several wait for each other."""
    import torch

    monkeypatch.setattr(training, "RATE", 3e-2)
    monkeypatch.setattr(training, "_STATIC_RATE", 3e-2)
    monkeypatch.setattr(training, "BATCH", 32)
    monkeypatch.setattr(training, "_TEXTS", 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def fill(engine: sa.Engine, encoder: Encoder) -> None:
    """A table of all texts, whose column belongs to an encoder."""
    use_encoder(encoder, name="tiny")
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    rows = [{"id": n, "body": " ".join(text)} for n, text in enumerate(TEXTS, start=1)]
    with Session(engine) as session:
        session.execute(sa.insert(Note), embed_rows(Note, rows))
        session.commit()


@pytest.fixture
def notes(engine: sa.Engine, tiny: Path) -> Encoder:
    """The encoder of the column of a table of texts."""
    encoder = Encoder.load(tiny, precision="fp32")
    fill(engine, encoder)
    return encoder


def test_full(engine: sa.Engine, notes: Encoder, tiny: Path, tmp_path: Path) -> None:
    """Trained by torch; run, and proven, without it."""
    out = tmp_path / "out"
    report = tune(engine, Note.embedding, PAIRS, out=out, method="full", epochs=25, matryoshka=[4])
    assert report.gain.low > 0.02, report
    assert report.side == "both"
    assert report.learning + report.held_out == len(TEXTS)
    assert "nDCG@10 at 4 dimensions" in report.notes
    tuned = Encoder.load(out)
    assert tuned.spec.fingerprint != notes.spec.fingerprint
    assert tuned.manifest.precision == "fp32", "that of the column's encoder"
    record = tuned.manifest.training
    assert record["base"]["fingerprint"] == notes.spec.fingerprint
    assert record["settings"]["epochs"] == 25
    assert record["settings"]["matryoshka"] == [4]
    assert record["settings"]["torch"]
    assert record["kept_back"]["questions"] == report.held_out
    assert len(record["learned_from"]["digest"]) == 32
    assert not any(f'"{question}"' in json.dumps(record) for question, _ in PAIRS)
    assert not list(tmp_path.glob(".*out-*")), "nothing is left of the training"
    # What sentence-transformers wrote gives the same, and can be trained again.
    import sentence_transformers as st

    reference = st.SentenceTransformer(str(whole.kept_model(out)), device="cpu")
    texts = [" ".join(text) for text in TEXTS[:9]]
    np.testing.assert_allclose(
        tuned.encode_document(texts), reference.encode_document(texts), atol=1e-4
    )
    assert whole._source(tuned, None) == whole.kept_model(out)
    assert reference.max_seq_length == 32, "the limit of training is none of the model"
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'sentence_transformers'): sys.modules[name] = None\n"
        "import sbert_pg.cli.app, sbert_pg.tuning\n"
        "from sbert_pg.encoder import Encoder\n"
        f"print(Encoder.load({str(out)!r}).encode_query(['n o p']).shape)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(1, 6)"


def test_the_same_again_is_the_same(tmp_path: Path, tiny: Path) -> None:
    """Seeds decide order, negatives and dropout; and nothing of torch's own state is touched."""
    import torch

    examples = [
        training.Example(asked(text), " ".join(text), [" ".join(TEXTS[n - 1])], n)
        for n, text in enumerate(TEXTS[:64])
    ]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        training.train(tiny, tmp_path / name, examples, epochs=1, seed=seed)
    assert torch.equal(state, torch.random.get_rng_state())
    a, b, c = (
        Encoder.load(tmp_path / name, precision="fp32").encode_query(["a b", "n o", "z"])
        for name in "abc"
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - c).max() > 1e-3


def test_nothing_is_written_without_a_gain(
    engine: sa.Engine, notes: Encoder, tmp_path: Path
) -> None:
    wrong = np.random.default_rng(0).permutation(len(PAIRS))
    noise = [(question, PAIRS[i][1]) for (question, _), i in zip(PAIRS, wrong, strict=True)]
    with pytest.raises(NoGainError, match="Nothing was written"):
        tune(engine, Note.embedding, noise, out=tmp_path / "x", method="full", epochs=1)
    assert not [p for p in tmp_path.iterdir() if "x" in p.name and p.suffix != ".lock"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_training_leaves_goes_with_the_next(
    engine: sa.Engine, notes: Encoder, tiny: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, sqlalchemy as sa, test_training as t\n"
        "t.use_encoder(t.Encoder.load(sys.argv[1], precision='fp32'), name='tiny')\n"
        "engine = sa.create_engine(sys.argv[2])\n"
        "t.tune(engine, t.Note.embedding, t.PAIRS, out=sys.argv[3], method='full', epochs=9999)\n"
    )
    url = engine.url.render_as_string(hide_password=False)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    other = tmp_path / ".training-out-2-abcdefgh"
    other.mkdir()

    def left() -> list[Path]:
        return [p for p in tmp_path.glob(".training-*") if p != other]

    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny), url, str(out)],
        env={**os.environ, "PYTHONPATH": path},
    )
    while not left():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    process.wait()
    (half,) = left()
    assert not out.exists()
    tune(engine, Note.embedding, PAIRS, out=out, method="full", epochs=25)
    assert not half.exists()
    assert left() == []
    assert other.exists(), "that of another encoder, which may be at work"


def test_batches_have_one_of_a_group() -> None:
    groups = np.array([0, 0, 0, 1, 2, 3, 4, 4] * 9)
    batches = list(training._batches(groups, np.random.default_rng(0)))
    for batch in batches:
        assert len({groups[i] for i in batch}) == len(batch) > 1
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    # What is left of the largest group alone has nothing to be told from.
    assert set(groups[list(set(range(len(groups))) - set(seen))]) <= {0}


def knowing(path: Path) -> Path:
    """A tiny model that knows the cipher: letter and 13th letter after it are one to it."""
    file = write_tiny(path) / "model.safetensors"
    tensors = load_file(file)
    # In whatever order, and with no prompt among them.
    tensors["embeddings.position_embeddings.weight"][:] = 0
    edit(path / "config_sentence_transformers.json", prompts={})
    words = tensors["embeddings.word_embeddings.weight"]
    for letter in LETTERS:
        words[WORDS.index(chr(ord(letter) + 13))] = words[WORDS.index(letter)]
    save_file(tensors, file)
    return path


def test_distill(engine: sa.Engine, tiny: Path, tmp_path: Path) -> None:
    """A student comes to know what its teacher does, from texts without labels."""
    fill(engine, Encoder.load(knowing(tmp_path / "wise"), precision="fp32"))
    edit(tiny / "config_sentence_transformers.json", prompts={})
    out = tmp_path / "student"
    report = tune(engine, Note.embedding, PAIRS, out=out, method="distill", base=tiny, epochs=20)
    assert report.gain.low > 0.02, report
    assert report.compared == str(tiny)
    assert "nDCG@10 of the column's own encoder" in report.notes
    assert "speed" in report.notes
    assert Encoder.load(out).manifest.training["settings"]["base"] == str(tiny)
    # Without a student it is a table of token vectors, which knows the cipher as it is.
    with pytest.raises(NoGainError, match="the vectors of its tokens"):
        tune(engine, Note.embedding, PAIRS, out=tmp_path / "x", method="distill", epochs=1)


def test_a_static_student(tmp_path: Path, tiny: Path) -> None:
    """A vector a token: it learns to give certain vectors, and runs without torch."""
    teacher = Encoder.load(tiny, precision="fp32")
    rows = np.random.default_rng(0).standard_normal((len(WORDS), 6)).astype(np.float32)
    texts = [" ".join(text) for text in TEXTS]
    wanted = teacher.encode_document(texts)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    likeness = []
    for name, epochs in (("before", 0), ("after", 10)):
        tokenizer = teacher.directory / "tokenizer.json"
        training.distil((tokenizer, rows), tmp_path / name, texts, wanted, epochs=epochs)
        student = Encoder.load(tmp_path / name, precision="fp32")
        assert student.dimensions == 6
        likeness.append(float((student.encode_document(texts) * wanted).sum(axis=1).mean()))
    assert likeness[0] < 0.5 < 0.9 < likeness[1]


def test_unlabelled_questions_are_sentences_of_the_texts(
    engine: sa.Engine, notes: Encoder, tmp_path: Path
) -> None:
    with pytest.raises(DeclarationError, match="two sentences and more"):
        tune(engine, Note.embedding, PAIRS, out=tmp_path / "x", method="unlabelled")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE note SET body = body || ' x. ' || body || ' y.'"))
    # All labelled questions judge, and none is learned from.
    with pytest.raises(NoGainError, match=f"judged by {len(PAIRS)} questions"):
        tune(engine, Note.embedding, PAIRS, out=tmp_path / "x", method="unlabelled", epochs=1)


def test_refusals(
    engine: sa.Engine, notes: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], match: str, **options: Any) -> None:
        options = {"out": tmp_path / "x", "method": "full", **options}
        with pytest.raises(error, match=match):
            tune(engine, Note.embedding, PAIRS, **options)

    refused(DeclarationError, "no method", method="magic")
    refused(DeclarationError, "has no base, epochs", method="linear", base="tiny", epochs=3)
    refused(DeclarationError, "has no matryoshka", method="distill", matryoshka=[4])
    refused(DeclarationError, "epochs=0", epochs=0)
    refused(DeclarationError, "from 1 to 5", matryoshka=[6])
    converted = notes.directory
    refused(EncoderNotFoundError, "as base", base=converted)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        patch.setitem(sys.modules, "sentence_transformers.sentence_transformer", None)
        refused(MissingExtraError, r"pip install 'sbert-pg\[train\]'")
