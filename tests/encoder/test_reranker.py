"""Every score against sentence-transformers' CrossEncoder (torch, fp32)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import SMALL, TEXTS, Wish, write_cross_encoder

from sbert_pg.encoder import Encoder, Reranker
from sbert_pg.errors import (
    ConversionError,
    DamagedEncoderError,
    EncodingError,
    UnsupportedEncoderError,
)

#: Each text with another one; every oddity stands on both sides.
PAIRS = [(TEXTS[n], TEXTS[(n * 7 + 3) % len(TEXTS)]) for n in range(len(TEXTS))]
MODELS: dict[str, tuple[Wish, dict[str, Any]]] = {
    "bert": (Wish("bert"), {"kind": "BertTokenizer"}),
    "bert, no token types": (Wish("bert", seed=1), {}),
    "bert, three labels": (Wish("bert", seed=2), {"kind": "BertTokenizer", "labels": 3}),
    "bert, logits": (
        Wish("bert", seed=3, general={"activation_fn": "torch.nn.modules.linear.Identity"}),
        {"kind": "BertTokenizer"},
    ),
    "distilbert": (Wish("distilbert"), {}),
    "roberta": (Wish("roberta"), {}),
    "xlm-roberta": (Wish("xlm-roberta"), {}),
    "camembert": (Wish("camembert"), {}),
    "mpnet": (Wish("mpnet"), {}),
    "albert": (Wish("albert", config={**SMALL, "embedding_size": 16}), {}),
    "electra": (Wish("electra", config={**SMALL, "embedding_size": 16}),
                {"kind": "ElectraTokenizer"}),
    "modernbert": (Wish("modernbert", config=SMALL), {}),
    "modernbert, mean and biases": (
        Wish("modernbert", seed=1, config={
            **SMALL, "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True,
            "classifier_activation": "silu",
        }), {"labels": 3},
    ),
    "qwen3": (
        Wish("qwen3", config={**SMALL, "num_key_value_heads": 2, "head_dim": 16}), {"labels": 2}
    ),
    "gte": (Wish("gte", config={**SMALL, "type_vocab_size": 2}), {"kind": "BertTokenizer"}),
    "gte, no token types": (Wish("gte", seed=1, config={**SMALL, "type_vocab_size": 0}), {}),
}  # fmt: skip

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    pytest.importorskip("sentence_transformers", reason="it is the reference")
    folder, written = tmp_path_factory.mktemp("rerankers"), set[str]()

    def make(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        if name not in written:
            wish, options = MODELS[name]
            write_cross_encoder(wish, path, **options)
            written.add(name)
        return path

    return make


@pytest.fixture
def bert(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("bert"), tmp_path / "bert"))


def predicted(path: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(1)
    return np.asarray(CrossEncoder(str(path), device="cpu").predict(pairs))


@pytest.mark.parametrize("name", MODELS)
def test_scores(made: Made, encoder_cache: Path, name: str) -> None:
    path = made(name)
    expected = predicted(path, PAIRS)
    for precision, room in (("fp32", 1e-5), ("fp32-plain", 1e-5), ("fp16", 5e-3)):
        ours = Reranker.load(path, precision=precision, cache_dir=encoder_cache)
        scores = ours.score_pairs(PAIRS)
        assert scores.shape == expected.shape
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(scores, expected, atol=room * scale)
    assert ours.labels == (expected.shape[1] if expected.ndim == 2 else 1)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_int8_orders_as_fp32_does(made: Made, encoder_cache: Path, name: str) -> None:
    expected = predicted(made(name), PAIRS)
    ours = Reranker.load(made(name), cache_dir=encoder_cache)
    assert ours.manifest.precision == "int8"
    assert ours.manifest.agreement["samples"].mean_cosine > 0.99
    assert np.corrcoef(ours.score_pairs(PAIRS), expected)[0, 1] > 0.99


def test_a_directory_of_transformers_alone(made: Made, encoder_cache: Path) -> None:
    """As most cross-encoders on the hub are: no modules.json."""
    path = made("bert").with_name("bert-transformer")
    ours = Reranker.load(path, precision="fp32", cache_dir=encoder_cache)
    np.testing.assert_allclose(ours.score_pairs(PAIRS[:30]), predicted(path, PAIRS[:30]), atol=1e-5)


def test_of_a_long_pair_the_longer_text_is_cut(made: Made, encoder_cache: Path) -> None:
    ours = Reranker.load(made("bert"), precision="fp32", cache_dir=encoder_cache)
    words = "the lake and the path " * 400
    pairs = [("short", words), (words, "short"), (words, words + "z"), (words[:3000], words)]
    # Where both are cut, the one with more tokens keeps one more, whatever their characters say.
    pairs += [(words[:1600], "a " * 300), ("a " * 300, words[:1600])]
    np.testing.assert_allclose(ours.score_pairs(pairs), predicted(made("bert"), pairs), atol=1e-5)
    assert ours.statistics.truncated == len(pairs)
    assert ours.statistics.texts == len(pairs)


def test_scores_do_not_depend_on_the_other_pairs(made: Made, encoder_cache: Path) -> None:
    ours = Reranker.load(made("bert"), precision="fp32", cache_dir=encoder_cache)
    together = ours.score("a question", TEXTS)
    alone = np.concatenate([ours.score("a question", [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert ours.score("a question", []).shape == (0,)
    with pytest.raises(EncodingError) as caught:
        ours.score("a question", ["fine", None])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_a_pickled_reranker_is_the_same(made: Made, encoder_cache: Path) -> None:
    ours = Reranker.load(made("bert"), precision="fp32", cache_dir=encoder_cache, threads=1)
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again, Reranker)
    assert (again.directory, again.labels, again.max_seq_length) == (
        ours.directory, ours.labels, ours.max_seq_length,
    )  # fmt: skip
    np.testing.assert_allclose(again.score("a lake", TEXTS[:5]), ours.score("a lake", TEXTS[:5]))


def test_encoder_and_reranker_are_not_taken_for_each_other(
    made: Made, encoder_cache: Path, minilm_path: Path
) -> None:
    ours = Reranker.load(made("bert"), precision="fp32", cache_dir=encoder_cache)
    with pytest.raises(UnsupportedEncoderError, match=r"Reranker\.load"):
        Encoder.load(ours.directory)
    with pytest.raises(UnsupportedEncoderError):
        Encoder.load(made("bert"), precision="fp32", cache_dir=encoder_cache)
    with pytest.raises(UnsupportedEncoderError, match=r"Encoder\.load"):
        Reranker.load(minilm_path, cache_dir=encoder_cache)


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "another activation": ("config_sentence_transformers.json", {"activation_fn": "os.system"}),
    "a default prompt": ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
    "an encoder": ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}),
    "a language model": ("config.json", {"architectures": ["BertForCausalLM"]}),
    "another architecture": ("config.json", {"model_type": "gpt2"}),
    "no architecture": ("config.json", {"architectures": None}),
    "code of another model": ("config.json", {"model_type": "new", "pack_qkv": True}),
    "labels": ("config.json", {"id2label": {"0": "a", "1": "b"}}),
    "labels that are none": ("config.json", {"id2label": 3}),
    "heads": ("config.json", {"num_attention_heads": 5}),
    "no heads": ("config.json", {"num_attention_heads": 0}),
    "width": ("config.json", {"hidden_size": 64}),
    "code": ("config.json", {"auto_map": {"AutoModel": "x.Y"}}),
    "another task": ("sentence_bert_config.json", {"transformer_task": "text-generation"}),
    "no room": ("tokenizer_config.json", {"model_max_length": 3}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_understood_is_refused(bert: Path, tmp_path: Path, case: str) -> None:
    file, values = HOSTILE[case]
    content = json.loads((bert / file).read_text())
    (bert / file).write_text(json.dumps({**content, **values}))
    with pytest.raises((UnsupportedEncoderError, DamagedEncoderError)):
        Reranker.load(bert, precision="fp32", cache_dir=tmp_path / "cache")


def test_missing_weights_and_unknown_modules_are_refused(bert: Path, tmp_path: Path) -> None:
    listing = json.loads((bert / "modules.json").read_text())
    more = [*listing, {"idx": 1, "name": "1", "path": "1", "type": "sentence_transformers.X"}]
    contents: list[Any] = [more, [], {}, 3, [1]]
    for content in contents:
        (bert / "modules.json").write_text(json.dumps(content))
        with pytest.raises((UnsupportedEncoderError, DamagedEncoderError)):
            Reranker.load(bert, precision="fp32", cache_dir=tmp_path / "cache")
    (bert / "modules.json").unlink()
    (bert / "model.safetensors").unlink()
    with pytest.raises(DamagedEncoderError, match=r"model\.safetensors"):
        Reranker.load(bert, precision="fp32", cache_dir=tmp_path / "cache")


def test_weights_that_are_not_finite_are_refused(bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    weights["classifier.bias"] = np.full_like(weights["classifier.bias"], np.nan)
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match="not finite"):
        Reranker.load(bert, precision="fp32", cache_dir=tmp_path / "cache")
