"""What a model may ask for, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbert_pg.encoder.description import describe
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError, UnsupportedEncoderError

#: Small files alone: descriptions do not read the weights.
SMALL = (
    "config.json", "config_sentence_transformers.json", "modules.json",
    "sentence_bert_config.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.fixture
def model(minilm_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "1_Pooling").mkdir(parents=True)
    for name in SMALL:
        shutil.copy(minilm_path / name, path / name)
    shutil.copy(minilm_path / "1_Pooling" / "config.json", path / "1_Pooling" / "config.json")
    (path / "model.safetensors").touch()
    return path


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_minilm(model: Path) -> None:
    found = describe(model)
    assert found.architecture == "bert"
    assert found.pooling == ("mean",)
    assert found.max_seq_length == 256
    assert found.dimensions == found.full_dimensions == 384
    assert found.normalized
    assert found.similarity == "cosine"


S = "sentence_transformers.models"


def modules(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = [
            {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_x", "type": name}
            for i, name in enumerate(names)
        ]
        (path / "modules.json").write_text(json.dumps(content))

    return change


def in_file(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name, **values)


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"")


def outside(path: Path) -> None:
    modules(f"{S}.Transformer", f"{S}.Pooling")(path)
    content = json.loads((path / "modules.json").read_text())
    content[0]["path"] = "../../etc"
    (path / "modules.json").write_text(json.dumps(content))


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("code", modules("custom.Transformer", f"{S}.Pooling"), "never run"),
    ("no pooling", modules(f"{S}.Transformer", f"{S}.Normalize"), "Pooling"),
    ("words", modules(f"{S}.WordEmbeddings", f"{S}.Pooling"), "WordEmbeddings"),
    ("pooling", in_file("1_Pooling/config.json", pooling_mode="median"), "median"),
    ("similarity", in_file("config_sentence_transformers.json", similarity_fn_name="jaccard"),
     "jaccard"),
    ("sparse", in_file("config_sentence_transformers.json", model_type="SparseEncoder"),
     "SparseEncoder"),
    ("arguments", in_file("sentence_bert_config.json", model_args={"quantization_config": {}}),
     "quantization_config"),
    ("task", in_file("sentence_bert_config.json", transformer_task="fill-mask"), "fill-mask"),
    ("adapter", in_file("adapter_config.json", r=8), "PEFT"),
    ("pickle", pickled, "pickle"),
    ("outside", outside, "outside"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in REFUSED],
                         ids=[case[0] for case in REFUSED])  # fmt: skip
def test_refused(model: Path, change: Callable[[Path], None], reason: str) -> None:
    change(model)
    with pytest.raises(UnsupportedEncoderError, match=reason):
        describe(model)


DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("weights", lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
    ("shard", in_file("model.safetensors.index.json", weight_map={"a": "b.safetensors"}),
     "b.safetensors"),
    ("json", lambda path: (path / "config.json").write_text("{"), r"config\.json"),
    ("list", lambda path: (path / "config.json").write_text("[]"), "no JSON object"),
    ("pooling", lambda path: (path / "1_Pooling/config.json").unlink(), "1_Pooling"),
    ("width", in_file("1_Pooling/config.json", word_embedding_dimension=7), "width 7"),
    ("prompt", in_file("config_sentence_transformers.json", default_prompt_name="x"), "'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in DAMAGED],
                         ids=[case[0] for case in DAMAGED])  # fmt: skip
def test_damaged(model: Path, change: Callable[[Path], None], reason: str) -> None:
    change(model)
    with pytest.raises(DamagedEncoderError, match=reason):
        describe(model)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(EncoderNotFoundError):
        describe(tmp_path)
    with pytest.raises(EncoderNotFoundError):
        describe(tmp_path / "nowhere")


def test_a_limit_beyond_the_positions_is_lowered(model: Path) -> None:
    edit(model / "sentence_bert_config.json", max_seq_length=1024)
    assert describe(model).max_seq_length == 512
    edit(model / "config.json", model_type="mpnet", max_position_embeddings=514, pad_token_id=1)
    assert describe(model).max_seq_length == 512


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"rope_theta": 10_000.0}, 2048),
        ({"rope_parameters": {"rope_type": "default"}}, 2048),
        ({"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}, 2048),
        ({"rotary_emb_fraction": 1.0}, 2048),
        ({"position_embedding_type": "alibi"}, 2048),
        ({"max_position_embeddings": -1}, 2048),
        ({"rope_theta": None}, 32),
        ({"position_embedding_type": "absolute"}, 32),
        ({}, 32),
    ],
)
def test_only_a_table_of_positions_is_a_limit(
    model: Path, values: dict[str, Any], limit: int
) -> None:
    edit(model / "sentence_bert_config.json", max_seq_length=2048)
    edit(model / "config.json", model_type="other", max_position_embeddings=32)
    edit(model / "config.json", **values)
    assert describe(model).max_seq_length == limit


@pytest.mark.parametrize(
    "kind", ["BertForSequenceClassification", "XLMRobertaForTokenClassification",
             "DebertaV2ForQuestionAnswering"],
)  # fmt: skip
def test_a_cross_encoder_without_a_list_of_modules_is_refused(model: Path, kind: str) -> None:
    edit(model / "config.json", architectures=[kind])
    assert describe(model).pooling == ("mean",), "with one it is a body under a head"
    (model / "modules.json").unlink()
    with pytest.raises(UnsupportedEncoderError, match=kind):
        describe(model)


#: What sentence-transformers writes beside the transformer's own files.
BESIDE = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "1_Pooling/config.json",
)  # fmt: skip


@pytest.mark.parametrize("left", BESIDE[1:])
@pytest.mark.parametrize("gone", ["copied in part", "a link to nothing"])
def test_a_copy_in_part_is_not_read_as_a_plain_transformer(
    model: Path, left: str, gone: str
) -> None:
    for name in BESIDE:
        if name != left:
            (model / name).unlink()
    if gone == "a link to nothing":
        content = (model / left).rename(model / "moved")
        (model / left).symlink_to(content)
        content.unlink()
    with pytest.raises(DamagedEncoderError, match=rf"{left}.*copy in part"):
        describe(model)


@pytest.mark.parametrize("name", [*BESIDE, "tokenizer_config.json"])
def test_a_link_to_nothing_is_no_missing_setting(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("/nowhere/at/all")
    with pytest.raises(DamagedEncoderError, match=name):
        describe(model)


def test_a_plain_transformer_is_read_with_a_warning(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in BESIDE:
        (model / name).unlink()
    assert describe(model).pooling == ("mean",)
    assert "modules.json" in caplog.text


def test_prompts_that_are_empty_keep_their_names(model: Path) -> None:
    edit(model / "config_sentence_transformers.json", prompts={"passage": "", "query": None})
    assert describe(model).prompts == {"passage": "", "query": ""}
