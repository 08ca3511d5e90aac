"""pgvector-python's own tests of its SQLAlchemy types, beside this library and with its types.

They are in pgvector's source distribution, which ``make slow`` puts into the environment.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import sqlalchemy as sa
from other_drivers import url_of

pytestmark = pytest.mark.slow

#: Their files, and what docs/frameworks.md says is different here: the errors of values that cannot
#: be stored, the types that reflection gives, and how a literal is written.
ERRORS = {"test_vector_bad_type", "test_halfvec_bad_type", "test_bad_dimensions", "test_bad_ndim",
          "test_bad_dtype"}  # fmt: skip
FILES = {
    "test_sqlalchemy.py": {*ERRORS, "test_inspect", "test_literal_binds"},
    "test_sqlmodel.py": {"test_bad_dimensions"},
}
#: Of newer releases of asyncpg, without this library as well; others fail after it.
UNRELATED = ["TestSqlalchemyAsync::test_bit[engine2]"]
THEIRS = "from pgvector.sqlalchemy import VECTOR, HALFVEC, BIT, SPARSEVEC, avg, sum"
OURS = """
from pgvector.sqlalchemy import BIT, SPARSEVEC, avg, sum
from sbert_pg import HalfVector as HALFVEC, Vector as VECTOR
"""
#: An array has no truth value of its own, so vectors are compared as a whole.
COMPARED = re.compile(r"assert ([\w.\[\]()]+) == (\[.+\]|embedding)$", re.MULTILINE)
SAME = """
import numpy as _numpy


def _same(left, right):
    return _numpy.array_equal(left, right) if isinstance(right, list) else left == right
"""


def suite(name: str, folder: Path, url: sa.URL, *, ours: bool) -> Path:
    """A file of their tests for this server."""
    version = importlib.metadata.version("pgvector")
    archive = Path(sys.prefix) / "sdist" / f"pgvector-{version}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there; 'make slow' downloads it")
    with tarfile.open(archive) as packed:
        member = packed.extractfile(f"pgvector-{version}/tests/{name}")
        assert member is not None
        text = member.read().decode()
    text, changed = re.subn(
        r"f?'postgresql\+(\w+)://(?:\{getuser\(\)\}@)?localhost/pgvector_python_test'",
        lambda found: repr(url_of(url, found[1]).render_as_string(hide_password=False)),
        text,
    )
    assert changed
    if ours:
        assert THEIRS in text
        text = COMPARED.sub(r"assert _same(\1, \2)", text.replace(THEIRS, OURS + SAME))
    tests = folder / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(
        "import numpy, sbert_pg\nfor name in sbert_pg.__all__:\n    getattr(sbert_pg, name)\n"
    )
    (tests / name).write_text(text)
    return tests / name


def failures(file: Path) -> set[str]:
    """Names of the tests that do not pass."""
    report = file.parent / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", report]
    left_out = [f"--deselect=tests/{file.name}::{name}" for name in UNRELATED]
    options = ["-o", "asyncio_mode=auto", f"--rootdir={file.parents[1]}", *left_out]
    subprocess.run([*command, *options, f"tests/{file.name}"], cwd=file.parents[1], check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) > 20
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return {str(case.get("name")).partition("[")[0] for case in bad}


@pytest.mark.parametrize("name", FILES)
def test_beside_this_library_all_of_it_passes(
    name: str, tmp_path: Path, bare_database_url: sa.URL
) -> None:
    assert failures(suite(name, tmp_path, bare_database_url, ours=False)) == set()


@pytest.mark.parametrize("name", FILES)
def test_with_the_types_of_this_library_it_passes_but_for_the_documented_differences(
    name: str, tmp_path: Path, bare_database_url: sa.URL
) -> None:
    failed = failures(suite(name, tmp_path, bare_database_url, ours=True))
    assert failed == FILES[name]
