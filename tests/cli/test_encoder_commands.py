"""``sbert-pg encoder``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Result, sbert_pg

from sbert_pg.cli.encoder import split_name


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
    result = sbert_pg("encoder", "show", COLUMNS="80")
    assert result.returncode == 0
    assert "sentence-transformers/all-mpnet-base-v2" in result.stdout, "in one piece"
    listed = json.loads(run(cache, "show", "--json").stdout)
    known = {each["name"].rpartition("/")[2]: each for each in listed}
    assert known["snowflake-arctic-embed-xs"]["retrieval"] == 52.7
    assert known["embeddinggemma-300m"]["licence"] == "Gemma"
    assert known["all-MiniLM-L6-v2"]["cost"] == 1
    assert known["static-retrieval-mrl-en-v1"]["max_seq_length"] is None
    assert all(each["licence"] and each["dimensions"] for each in known.values())


def test_convert_then_show(cache: Path, minilm_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    result = run(cache, "convert", f"{minilm_path}:fp32", "-o", str(target))
    assert result.returncode == 0, result.stderr
    facts = json.loads(run(cache, "show", str(target), "--json").stdout)
    assert facts["fingerprint"] in result.stdout
    assert facts["dimensions"] == 384
    assert facts["directory"] == str(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    shown = run(cache, "show", str(target), "--check")
    assert shown.returncode == 0, shown.stderr
    assert facts["fingerprint"] in shown.stdout
    again = run(cache, "convert", str(minilm_path), "-o", str(target))
    assert again.returncode == 1
    assert "never overwritten" in " ".join(again.stderr.split())
    (target / "model.onnx").write_bytes(b"damaged")
    damaged = run(cache, "show", str(target))
    assert damaged.returncode == 1
    assert "model.onnx" in damaged.stderr


def test_an_unknown_name_is_explained(cache: Path) -> None:
    result = run(cache, "show", "./nowhere")
    assert result.returncode == 1
    assert "EncoderNotFoundError" in result.stderr
