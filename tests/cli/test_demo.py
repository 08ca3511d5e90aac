"""The tour, on a part of the standard library, and what its figures rest on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from standard_docstrings import toured

from sbert_pg import catalog, registry, system
from sbert_pg.cli import demo, demo_change, demo_data
from sbert_pg.errors import EncoderNotFoundError
from sbert_pg.testing import DeterministicEncoder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred entries, and an old encoder of another space."""
    wanted = {"difflib": 8, "filecmp": 6, "heapq": 8, "datetime": 20, "logging.handlers": 60}
    entries = [
        entry
        for module, most in wanted.items()
        for entry in [e for e in toured() if e.module == module][:most]
    ]
    monkeypatch.setattr(demo, "searchable", lambda: entries)
    monkeypatch.setattr(demo_change, "_SIDE_BY_SIDE", 0.4)
    old = DeterministicEncoder(dimensions=384)
    registry.use_encoder(old, name=demo_data.OLD_ENCODER)


@pytest.mark.usefixtures("minilm", "few")
def test_the_tour(engine: sa.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    demo.tour(engine)
    shown = capsys.readouterr().out
    assert "difflib.SequenceMatcher" in shown
    assert "logging.handlers > HTTPHandler" in shown
    lines = re.findall(r"│ (\w+) +│ (old|new) +│ +([\d,]+) +│ +(\d+) +│ +([\d.]+)", shown)
    assert [line[0] for line in lines] == [
        "begin", "backfill", "verify", "switch", "switch", "finish"
    ]  # fmt: skip
    assert {wrong for *_, wrong, _ in lines} == {"0"}
    assert {recall for *_, recall in lines} == {"1.000"}
    assert sum(int(questions) for _, _, questions, *_ in lines) > 0
    with engine.connect() as connection:
        columns = system.stored_types(connection, demo.TABLE)
    assert demo.COLUMN in columns
    assert demo.REPLACED not in columns
    # A question finds the table as the tour has left it; a second tour begins again.
    mapped = demo.prepared(engine)
    ((function, _),), _ = demo.ask(engine, mapped, "smallest items", 1)
    assert f"{function.module}.{function.name}" == "heapq.nsmallest"
    with engine.begin() as connection:
        demo._drop(connection)
        assert not sa.inspect(connection).has_table(demo.TABLE)


@pytest.mark.usefixtures("minilm", "few")
def test_an_answer_of_another_space_is_counted(engine: sa.Engine) -> None:
    mapped = demo.function_class(demo.COLUMN, demo.NEW_ENCODER)
    with engine.begin() as connection:
        catalog.upgrade(connection)
    demo._fill(engine, mapped, demo.searchable())
    asker = demo_change.Asker(engine, mapped.embedding_l6, demo.QUESTIONS)
    asker._ask(demo.QUESTIONS[0], 0)
    right = asker.phase()
    assert (right.questions, right.wrong, right.recall) == (1, 0, 1.0)
    truth = asker.truth[demo.QUESTIONS[0]]
    asker.truth[demo.QUESTIONS[0]] = {key: -value for key, value in truth.items()}
    asker._ask(demo.QUESTIONS[0], 0)
    assert asker.phase().wrong == 1


def test_an_error_of_the_asking_thread_is_raised(engine: sa.Engine, minilm: Any) -> None:
    mapped = demo.function_class(demo.COLUMN, demo.NEW_ENCODER)
    entry = demo_data.Documented("module", "name", "()", "A docstring of some length.")
    demo._fill(engine, mapped, [entry])
    asker = demo_change.Asker(engine, mapped.embedding_l6, demo.QUESTIONS)
    with engine.begin() as connection:
        demo._drop(connection)
    with pytest.raises(sa.exc.ProgrammingError), asker:
        asker._thread.join()


def test_a_package_with_another_model_is_refused(tmp_path: Path) -> None:
    import numpy as np
    from onnx import helper, numpy_helper, save

    weight = numpy_helper.from_array(np.eye(2, dtype=np.float32), "model.0.auto_model.w")
    graph = helper.make_graph([], "empty", [], [], [weight])
    save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(EncoderNotFoundError, match="another model"):
        demo_data._weights(tmp_path / "model.onnx")
