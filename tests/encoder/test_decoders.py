"""Qwen3, Mistral and Gemma3 against sentence-transformers (torch, fp32)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_models import SMALL, TEXTS, Make, Wish, edit, worst

from sbert_pg.encoder import Encoder
from sbert_pg.errors import EncoderError, UnsupportedEncoderError

HEADS = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
GEMMA = {
    **HEADS,
    "num_hidden_layers": 3,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 24,
}
INSTRUCTION = {"prompts": {"query": "Instruct: Find what answers.\nQuery:", "document": ""}}
#: The longest text is longer than a block of queries.
LONG = 600
MODELS = {
    "qwen3": Wish("qwen3", config=HEADS, pooling="lasttoken", max_seq_length=LONG,
                  general=INSTRUCTION),
    "qwen3, biases": Wish("qwen3", config={**HEADS, "attention_bias": True, "head_dim": 10,
                                           "rope_parameters": {"rope_type": "default",
                                                               "rope_theta": 1e6}}),
    "mistral": Wish("mistral", config={**SMALL, "num_key_value_heads": 1, "sliding_window": 20},
                    pooling="lasttoken", max_seq_length=LONG),
    "mistral, no window": Wish("mistral", config={**HEADS, "sliding_window": None}),
    "gemma3": Wish(
        "gemma3_text", config={**GEMMA, "use_bidirectional_attention": True}, max_seq_length=LONG,
        layers=((96, "Identity", False), (32, "Identity", False), "normalize"),
        general={"prompts": {"query": "task: search result | query: ",
                             "document": "title: none | text: "}},
    ),
    "gemma3, causal": Wish("gemma3_text", config=GEMMA, max_seq_length=LONG),
}  # fmt: skip

Reference = Callable[[Path], Any]


@pytest.mark.parametrize("name", MODELS)
def test_vectors(make_model: Make, reference: Reference, encoder_cache: Path, name: str) -> None:
    path, wish = make_model(MODELS[name]), MODELS[name]
    theirs = reference(path)
    expected = theirs.encode(TEXTS, batch_size=8)
    forms = [("fp32", 0.99999, 1e-5)]
    if "," not in name:
        forms += [("fp32-plain", 0.99999, 1e-5), ("fp16", 0.9999, 1e-2)]
    for precision, least, room in forms:
        ours = Encoder.load(path, precision=precision, cache_dir=encoder_cache)
        assert ours.manifest.exporter == "graph"
        assert ours.max_seq_length == wish.max_seq_length
        cosine, difference = worst(ours.encode(TEXTS), expected)
        assert cosine >= least
        assert difference <= room
    if wish.general:
        exact = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
        few = TEXTS[::4]
        assert worst(exact.encode_query(few), theirs.encode_query(few))[1] <= 1e-5
        assert worst(exact.encode_document(few), theirs.encode_document(few))[1] <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_text(
    make_model: Make, reference: Reference, tmp_path: Path, side: str
) -> None:
    """sentence-transformers pads where the tokenizer says; here no side changes a vector."""
    path = Path(shutil.copytree(make_model(MODELS["qwen3"]), tmp_path / "model"))
    edit(path / "tokenizer_config.json", padding_side=side)
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    few = TEXTS[::3]
    assert worst(ours.encode(few), reference(path).encode(few, batch_size=7))[1] <= 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_no_square_of_a_text_is_held(make_model: Make, encoder_cache: Path, name: str) -> None:
    """Scores are made in blocks: inside ``Scan``, or for a window."""
    onnx = pytest.importorskip("onnx")
    path = make_model(MODELS[name])
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    nodes = onnx.load(ours.directory / "model.onnx").graph.node
    windowed = sum(node.op_type == "Softmax" for node in nodes)
    through = sum(node.op_type == "Scan" for node in nodes)
    assert (windowed, through) == ((2, 1) if name == "gemma3" else (0, 2))
    assert not [node for node in nodes if "Attention" in node.op_type]


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown key": ("qwen3", {"is_causal": False}),
    "a scaling": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "another rotation": ("qwen3", {"rope_parameters": {"rope_type": "llama3"}}),
    "windows": ("qwen3", {"use_sliding_window": True}),
    "kinds of layers": ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "keys that do not fit": ("qwen3", {"num_key_value_heads": 3}),
    "no width of a head": ("qwen3", {"head_dim": None}),
    "an odd width of a head": ("qwen3", {"head_dim": 15}),
    "heads that are missing": ("mistral", {"num_key_value_heads": None}),
    "kinds of layers in Mistral": ("mistral", {"layer_types": ["full_attention"] * 2}),
    "a window of none": ("mistral", {"sliding_window": 0}),
    "capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}),
    "a scalar": ("gemma3", {"query_pre_attn_scalar": 0}),
    "kinds that are none": ("gemma3", {"layer_types": ["chunked_attention"] * 3}),
    "kinds that are no names": ("gemma3", {"layer_types": [[], {}, 3]}),
    "layers that are missing": ("gemma3", {"num_hidden_layers": 7, "layer_types": None}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_understood_is_refused(make_model: Make, tmp_path: Path, case: str) -> None:
    name, changes = HOSTILE[case]
    path = Path(shutil.copytree(make_model(MODELS[name]), tmp_path / "model"))
    edit(path / "config.json", **changes)
    with pytest.raises(EncoderError) as caught:
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    if case == "an unknown key":
        assert isinstance(caught.value, UnsupportedEncoderError)
        assert "is_causal" in str(caught.value)
