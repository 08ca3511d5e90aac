"""``sbert-pg encoder``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from command_line import Result, sbert_pg

from sbert_pg.cli.encoder import split_name

FAQ = [
    ("how do I get my money back", "Refunds are paid to your card within five days."),
    ("when are you open", "The shop opens at nine and closes at six."),
    ("do you have vacancies", "Send your application to the careers page."),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def run(cache: Path, *arguments: str) -> Result:
    return sbert_pg("encoder", *arguments, SBERT_PG_CACHE=str(cache))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name:fp32", ("org/name", "fp32")),
        ("./a:b", ("./a:b", None)),
        ("x:fp32-plain", ("x", "fp32-plain")),
    ],
)
def test_precision_after_a_name(name: str, expected: tuple[str, str | None]) -> None:
    assert split_name(name) == expected


def test_list_has_what_a_choice_is_made_by(cache: Path) -> None:
    result = sbert_pg("encoder", "list", COLUMNS="80")
    assert result.returncode == 0
    assert "sentence-transformers/all-mpnet-base-v2" in result.stdout, "in one piece"
    listed = json.loads(run(cache, "list", "--json").stdout)
    known = {each["name"].rpartition("/")[2]: each for each in listed}
    assert known["snowflake-arctic-embed-xs"]["retrieval"] == 52.7
    assert known["embeddinggemma-300m"]["licence"] == "Gemma"
    assert known["all-MiniLM-L6-v2"]["cost"] == 1
    assert known["static-retrieval-mrl-en-v1"]["max_seq_length"] is None
    assert all(each["licence"] and each["dimensions"] for each in known.values())


def test_convert_then_show(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    result = run(cache, "convert", f"{minilm_path}:fp32", "-o", str(target), "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["dimensions"] == 384
    assert facts["directory"] == str(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    shown = run(cache, "show", str(target), "--check")
    assert shown.returncode == 0, shown.stderr
    assert facts["fingerprint"] in shown.stdout
    again = run(cache, "convert", str(minilm_path), "-o", str(target))
    assert again.returncode == 1
    assert "--again" in again.stderr
    (target / "model.onnx").write_bytes(b"damaged")
    damaged = run(cache, "show", str(target))
    assert damaged.returncode == 1
    assert "model.onnx" in damaged.stderr


def test_compare_questions_and_pairs(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    faq = tmp_path / "faq.csv"
    lines = "\n".join(f'"{question}","{answer}"' for question, answer in FAQ)
    faq.write_text(f"question,answer\n{lines}\n")
    name = f"{minilm_path}:fp32"
    result = run(cache, "compare", name, name, "--csv", str(faq), "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["recall@1"] for row in rows] == [1.0, 1.0]
    assert rows[0]["texts/s"] > 0
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b,score\na cat,a kitten,5\na cat,a lorry,0\nrain,wet weather,4\n")
    result = run(cache, "compare", name, "--csv", str(pairs), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["spearman"] > 0.4
    (tmp_path / "wide.csv").write_text("a,b,c,d\n1,2,3,4\n")
    for arguments in (["--csv", str(tmp_path / "wide.csv")], [], ["--csv", "nowhere.csv"]):
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


def test_an_unknown_name_is_explained(cache: Path) -> None:
    result = run(cache, "show", "./nowhere")
    assert result.returncode == 1
    assert "EncoderNotFoundError" in result.stderr
