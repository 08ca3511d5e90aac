"""ALBERT, ELECTRA and T5 against sentence-transformers; and the table of all architectures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, COLUMNS, DOCS, STEPS, documented, measure, shown
from encoder_models import SMALL, TEXTS, Make, Wish, edit, worst

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.description import STATIC
from sbert_pg.encoder.graph import ARCHITECTURES as BUILT
from sbert_pg.errors import EncoderError, UnsupportedEncoderError

Reference = Callable[[Path], Any]
PROMPTS = {"prompts": {"query": "find this: ", "document": "text: "}}
POOLINGS = ("weightedmean", "max", "lasttoken", "cls")
MODELS = {
    "albert": Wish(
        "albert",
        config={**SMALL, "embedding_size": 16, "num_hidden_layers": 5, "num_hidden_groups": 2,
                "inner_group_num": 2, "hidden_act": "gelu"},
        pooling=POOLINGS, include_prompt=False, layers=(), general=PROMPTS,
    ),
    "albert, as wide as its layers": Wish("albert", config={**SMALL, "embedding_size": 48}),
    "electra": Wish(
        "electra", config={**SMALL, "embedding_size": 16},
        pooling=POOLINGS, include_prompt=False, layers=(), general=PROMPTS,
    ),
    "electra, as wide as its layers": Wish("electra", config={**SMALL, "embedding_size": 48}),
    "t5": Wish(
        "t5", config={**SMALL, "head_dim": 20, "feed_forward_proj": "gated-gelu",
                      "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40},
        pooling=POOLINGS, include_prompt=False, layers=(), general=PROMPTS, max_seq_length=600,
    ),
    "t5, no gate": Wish(
        "t5", config={**SMALL, "head_dim": 8}, max_seq_length=600,
        layers=((32, "Identity", False), "normalize"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_vectors(make_model: Make, reference: Reference, encoder_cache: Path, name: str) -> None:
    path, wish = make_model(MODELS[name]), MODELS[name]
    theirs = reference(path)
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    assert ours.manifest.exporter == "graph"
    assert ours.max_seq_length == wish.max_seq_length
    few = TEXTS[::3]
    for mine, other in (
        (ours.encode(TEXTS), theirs.encode(TEXTS)),
        (ours.encode_query(few), theirs.encode_query(few)),
        (ours.encode_document(few), theirs.encode_document(few)),
    ):
        cosine, difference = worst(mine, other)
        assert cosine >= 0.99999
        # Processors round sums in different orders.
        assert difference <= 3e-5 * max(1.0, float(abs(other).max()))


def test_shared_layers_are_stored_once(make_model: Make, encoder_cache: Path) -> None:
    sizes = {
        layers: (
            Encoder.load(
                make_model(Wish("albert", config={**SMALL, "num_hidden_layers": layers})),
                precision="fp32",
                cache_dir=encoder_cache,
            ).directory
            / "model.onnx"
        )
        .stat()
        .st_size
        for layers in (1, 6)
    }
    weights = 4 * (4 * 48 * 48 + 2 * 48 * 96)
    assert sizes[6] - sizes[1] < weights, "five more layers, less than one layer's weights"


def test_no_square_of_a_text_is_held(make_model: Make, encoder_cache: Path) -> None:
    """T5's bias is made for a block of queries at a time, inside ``Scan``."""
    onnx = pytest.importorskip("onnx")
    ours = Encoder.load(make_model(MODELS["t5"]), precision="fp32", cache_dir=encoder_cache)
    nodes = onnx.load(ours.directory / "model.onnx").graph.node
    assert sum(node.op_type == "Scan" for node in nodes) == SMALL["num_hidden_layers"]
    assert not [node for node in nodes if node.op_type == "Softmax" or "Attention" in node.op_type]


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown key of ALBERT": ("albert", {"attention_sink": 4}),
    "an unknown key of ELECTRA": ("electra", {"attention_sink": 4}),
    "an unknown key of T5": ("t5", {"attention_sink": 4}),
    "more groups than layers": ("albert", {"num_hidden_groups": 9}),
    "groups that are missing": ("albert", {"num_hidden_groups": 5}),
    "layers of a group that are missing": ("albert", {"inner_group_num": 3}),
    "another width of the embeddings": ("albert", {"embedding_size": 24}),
    "no projection": ("electra", {"embedding_size": 48}),
    "other positions": ("electra", {"position_embedding_type": "relative_key"}),
    "a decoder": ("electra", {"is_decoder": True}),
    "a decoder of T5": ("t5", {"is_decoder": True}),
    "buckets that do not fit": ("t5", {"relative_attention_num_buckets": 20}),
    "buckets that are no number": ("t5", {"relative_attention_num_buckets": 18}),
    "a distance of none": ("t5", {"relative_attention_max_distance": 4}),
    "another feed-forward part": ("t5", {"feed_forward_proj": "relu"}),
    "an activation": ("t5", {"feed_forward_proj": "gated-laplace"}),
    "an activation that contradicts": ("t5", {"dense_act_fn": "relu"}),
    "layers that are missing": ("t5", {"num_layers": 9}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_understood_is_refused(make_model: Make, tmp_path: Path, case: str) -> None:
    name, changes = HOSTILE[case]
    path = Path(shutil.copytree(make_model(MODELS[name]), tmp_path / "model"))
    edit(path / "config.json", **changes)
    with pytest.raises(EncoderError) as caught:
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    if "unknown" in case:
        assert isinstance(caught.value, UnsupportedEncoderError)
        assert "attention_sink" in str(caught.value)


def test_the_table_has_every_architecture() -> None:
    assert set(documented()) == set(ARCHITECTURES)
    assert set(ARCHITECTURES) >= BUILT - {STATIC}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_says_what_is_measured(tmp_path: Path, name: str) -> None:
    """``PYTHONPATH=tests/helpers python -m architectures`` writes it."""
    for package in ("torch", "sentence_transformers", "onnxscript"):
        pytest.importorskip(package)
    row, said = measure(name, tmp_path), documented()[name]
    steps = [f"{step:g}".removeprefix("0") for step in STEPS]
    for column in COLUMNS:
        cell = row[column]
        if isinstance(cell, str):
            assert said[column] == cell, f"{DOCS}: {column}"
            continue
        assert cell >= STEPS[steps.index(said[column])], f"{DOCS}: {column} promises too much"
        near = abs(steps.index(said[column]) - steps.index(shown(cell)))
        assert near <= 1, f"{DOCS}: {column} is {shown(cell)} now"
