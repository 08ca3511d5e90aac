"""``sbert-pg encoder`` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg.cli.encoder import split_name

FAQ = [
    ("how do I get my money back", "Refunds are paid to your card within five days."),
    ("when are you open", "The shop opens at nine and closes at six."),
    ("do you have vacancies", "Send your application to the careers page."),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def run(cache: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "-m", "sbert_pg.cli.app", "encoder", *arguments],
        env={**kept, "SBERT_PG_CACHE": str(cache), "COLUMNS": "200"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name:fp32", ("org/name", "fp32")),
        ("./a:b", ("./a:b", None)),
        ("x:int8-blocks", ("x", "int8-blocks")),
    ],
)
def test_precision_after_a_name(name: str, expected: tuple[str, str | None]) -> None:
    assert split_name(name) == expected


def test_list(cache: Path) -> None:
    result = run(cache, "list")
    assert result.returncode == 0
    assert "all-mpnet-base-v2" in result.stdout
    known = json.loads(run(cache, "list", "--json").stdout)
    assert {"name", "dimensions", "good_for"} <= set(known[0])


def test_convert_then_show(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    result = run(cache, "convert", f"{minilm_path}:fp32", "-o", str(target), "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["dimensions"] == 384
    assert facts["directory"] == str(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    shown = run(cache, "show", str(target), "--verify")
    assert shown.returncode == 0, shown.stderr
    assert facts["fingerprint"] in shown.stdout
    again = run(cache, "convert", str(minilm_path), "-o", str(target))
    assert again.returncode == 1
    assert "--again" in again.stderr
    (target / "model.onnx").write_bytes(b"damaged")
    damaged = run(cache, "show", str(target))
    assert damaged.returncode == 1
    assert "model.onnx" in damaged.stderr


def test_encode(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    name = f"{minilm_path}:fp32"
    result = run(cache, "encode", name, "one", "two")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(row) for row in rows] == [384, 384]
    piped = run(cache, "encode", name, "-o", str(tmp_path / "x.npy"), stdin="one\ntwo\n")
    assert piped.returncode == 0, piped.stderr
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), rows, atol=1e-6)


def test_compare_questions_and_pairs(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    faq = tmp_path / "faq.csv"
    lines = "\n".join(f'"{question}","{answer}"' for question, answer in FAQ)
    faq.write_text(f"question,answer\n{lines}\n")
    name = f"{minilm_path}:fp32"
    result = run(cache, "compare", name, name, "--questions", str(faq), "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["recall@1"] for row in rows] == [1.0, 1.0]
    assert rows[0]["texts/s"] > 0
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b,score\na cat,a kitten,5\na cat,a lorry,0\nrain,wet weather,4\n")
    result = run(cache, "compare", name, "--pairs", str(pairs), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["spearman"] > 0.4
    for arguments in (["--pairs", str(faq)], [], ["--pairs", str(pairs), "--questions", str(faq)]):
        assert run(cache, "compare", name, *arguments).returncode == 1


def test_compare_from_a_query(cache: Path, minilm_path: Path, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE faq (question text, answer text)"))
        for question, answer in FAQ:
            connection.execute(
                sa.text("INSERT INTO faq VALUES (:q, :a)"), {"q": question, "a": answer}
            )
    result = run(
        cache, "compare", f"{minilm_path}:fp32", "--json",
        "--database", engine.url.render_as_string(hide_password=False),
        "--query", "SELECT question, answer FROM faq",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["ndcg@10"] == 1


def test_bench(cache: Path, minilm_path: Path) -> None:
    result = run(cache, "bench", f"{minilm_path}:fp32", "--seconds", "0.1", "--json")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert [row["texts"] for row in measured["throughput"]] == ["short", "medium", "long"]
    assert measured["query_ms"]["p50"] > 0


def test_an_unknown_name_is_explained(cache: Path) -> None:
    result = run(cache, "show", "./nowhere")
    assert result.returncode == 1
    assert "EncoderNotFoundError" in result.stderr
