"""The two other kinds of model, as descriptions: static ones, and cross-encoders.

A static model has a vector for each token, and of a text gives their mean: the files of
sentence-transformers' ``StaticEmbedding`` and of model2vec. A directory with ``modules.json`` means
what sentence-transformers makes of it, one without what model2vec does: it reads ``max_length``
tokens, and of a text only so many characters as these have by the median of the vocabulary; and it
leaves out tokens that are unknown.

A cross-encoder is a transformer with a classifier, which scores a pair of texts. A classifier is
what follows pooling, as the layers of an encoder are: dense layers over the first token or the mean
of all. So it is a ``Description`` too, whose "vector" are its scores.

Sources: ``sentence_transformer/modules/static_embedding.py`` and ``cross_encoder/model.py`` of
sentence-transformers 6.2, ``model.py`` of model2vec 0.10; ``*ForSequenceClassification`` in
transformers' models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sbert_pg.encoder.description import (
    IN_SPEC,
    MODULES_LIMIT,
    STATIC,
    TRANSFORMER_FILES,
    Description,
    conventions,
    describe,
    first_architecture,
    general_of,
    hidden_size,
    modules_of,
    plain,
    require_harmless,
    transformer_of,
)
from sbert_pg.encoder.files import (
    JSON_LIMIT,
    Array,
    Settings,
    Weights,
    find_weights,
    inside,
    read_if_there,
    read_json,
    read_list,
    require_model,
)
from sbert_pg.encoder.layers import Dense, Layer, Norm, PoolingMode, read_layers, torch_class
from sbert_pg.encoder.tokenizer_files import is_model2vec, tokenizer_class
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError
from sbert_pg.probes import SAMPLE_TEXTS

#: Tokens that model2vec reads where its configuration does not say.
_MAX_LENGTH = 512
#: Pairs on which forms of one cross-encoder are compared and ranges of int8 are chosen.
SAMPLE_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (SAMPLE_TEXTS[number], SAMPLE_TEXTS[(number + step) % len(SAMPLE_TEXTS)])
    for step in (0, 1, 7)
    for number in range(len(SAMPLE_TEXTS))
)

_PROJECTED = ("classifier.dense", "Tanh", "classifier.out_proj")
#: Over what is pooled, by ``model_type``: a dense layer, if any, its activation, the classifier.
_HEADS: Mapping[str, tuple[str, str, str]] = {
    "bert": ("pooler.dense", "Tanh", "classifier"),
    "distilbert": ("pre_classifier", "ReLU", "classifier"),
    "roberta": _PROJECTED,
    "xlm-roberta": _PROJECTED,
    "camembert": _PROJECTED,
    "mpnet": _PROJECTED,
    "albert": ("pooler", "Tanh", "classifier"),
    "electra": ("classifier.dense", "GELU", "classifier.out_proj"),
    "gte": ("pooler.dense", "Tanh", "classifier"),
    "modernbert": ("head.dense", "", "classifier"),
    "qwen3": ("", "", "score"),
}
#: Activations of ModernBERT's head, by transformers' names.
_HEAD_ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU", "tanh": "Tanh"}
#: Activations of a score, by the name of torch's class.
_ACTIVATIONS = ("Identity", "Sigmoid")


def describe_encoder(path: str | Path) -> Description:
    """``describe`` for every encoder, static ones included; arguments and errors as there."""
    root = Path(path)
    require_model(root)
    modules = modules_of(root)
    if modules[0][0] != STATIC:
        return describe(root)
    where = inside(root, modules[0][1])
    weights = find_weights(where)
    config, general = read_if_there(root / "config.json"), general_of(root)
    rows = table(weights)
    return Description(
        path=root,
        transformer_path=where,
        architecture=STATIC,
        config=Settings({"hidden_size": rows.shape[1], "vocab_size": len(rows)}, config.path),
        configuration={
            "config": plain(config),
            "general": plain(general, IN_SPEC),
            "modules": [name for name, _ in modules],
        },
        weights=weights,
        pooling=("mean",),
        layers=read_layers(root, modules[1:], rows.shape[1]),
        max_seq_length=_limit(root, where, config),
        **conventions(general),
    )


def _limit(root: Path, where: Path, config: Settings) -> int | None:
    """The limit of a text in tokens; sentence-transformers keeps that of the tokenizer's file."""
    if not is_model2vec(root):
        truncation = read_json(where / "tokenizer.json", JSON_LIMIT).object("truncation")
        return truncation.integer("max_length", None)
    unlimited = "max_length" in config and config["max_length"] is None
    return None if unlimited else config.integer("max_length", _MAX_LENGTH)


def table(paths: tuple[Path, ...]) -> Array:
    """The vector of each token, ``(tokens, width)``, with model2vec's mapping and weights in it."""
    weights = Weights(paths, integers=True)
    rows = weights.get("embedding.weight" if "embedding.weight" in weights else "embeddings")
    if rows.ndim != 2 or not rows.size:
        raise DamagedEncoderError(f"{paths[0]}: vectors of the shape {rows.shape} are not a table.")
    if "embedding.weight" in weights:
        return rows
    if "mapping" in weights:
        mapping = weights.get("mapping")
        if mapping.ndim != 1 or mapping.min() < 0 or mapping.max() >= len(rows):
            raise DamagedEncoderError(
                f"{paths[0]}: 'mapping' names rows that the {len(rows)} vectors do not have."
            )
        rows = rows[mapping.astype(np.int64)]
    if "weights" in weights:
        rows = rows * weights.get("weights", (len(rows),))[:, None]
    return rows


def describe_reranker(path: str | Path) -> Description:
    """Read what the directory of a cross-encoder at ``path`` says about itself."""
    root = Path(path)
    require_model(root)
    _require_lone_transformer(root / "modules.json")
    general, settings = _general(root), read_if_there(root / TRANSFORMER_FILES[0])
    settings.only("transformer_task", ["sequence-classification"], "sequence-classification")
    require_harmless(settings)
    own, tokenizer = transformer_of(root, settings)
    config, architecture = own["config"], own["architecture"]
    kind = first_architecture(config)
    if architecture not in _HEADS or not kind.endswith("ForSequenceClassification"):
        raise UnsupportedEncoderError(
            f"{config.path}: {kind or architecture!r} is not a cross-encoder that is implemented; "
            f"implemented are sequence classifiers of {', '.join(_HEADS)}. Encoders are loaded "
            "with Encoder.load."
        )
    pooling: PoolingMode = "lasttoken" if architecture == "qwen3" else "cls"
    if architecture == "modernbert":
        pooling = config.only("classifier_pooling", ["cls", "mean"], "cls")
    activation = _activation(general, config)
    return Description(
        path=root,
        configuration={
            **own.pop("configuration"), "settings": plain(settings), "general": plain(general),
            "modules": ["Transformer", "Classifier"],
        },
        pooling=(pooling,),
        layers=_classifier(Weights(own["weights"]), config, _HEADS[architecture], activation),
        pairs=True,
        token_types=_token_types(config, tokenizer),
        **own,
    )  # fmt: skip


def _require_lone_transformer(listing: Path) -> None:
    if not listing.is_file():
        return
    modules = read_list(listing, MODULES_LIMIT)
    kinds = [str(m.get("type")) if isinstance(m, dict) else "" for m in modules]
    if [kind.rpartition(".")[2] for kind in kinds] != ["Transformer"] or modules[0].get("path"):
        raise UnsupportedEncoderError(
            f"{listing} lists the modules {', '.join(kinds)[:200] or 'none'}; a cross-encoder that "
            "is implemented has a Transformer alone, whose head gives the scores. Encoders are "
            "loaded with Encoder.load."
        )


def _general(root: Path) -> Settings:
    general = read_if_there(root / "config_sentence_transformers.json")
    general.only("model_type", ["CrossEncoder"], "CrossEncoder")
    if general.text("default_prompt_name", None) is not None:
        general.only("default_prompt_name", [""])
    return general


def _activation(general: Settings, config: Settings) -> str | None:
    """The activation of the scores; ``None`` where their number decides."""
    places = (
        (general, "activation_fn"),
        (config.object("sentence_transformers"), "activation_fn"),
        (config, "sbert_ce_default_activation_function"),
    )
    for settings, key in places:
        path = settings.text(key, None)
        if path is not None:
            return torch_class(settings, key, path, _ACTIVATIONS)
    return None


def _classifier(
    weights: Weights, config: Settings, head: tuple[str, str, str], activation: str | None
) -> tuple[Layer, ...]:
    width, (first, first_activation, last) = hidden_size(config), head
    layers: list[Layer] = []
    if first_activation:
        layers = [_dense(weights, first, first_activation, width, width)]
    elif first:
        layers = _normed_head(weights, config, width)
    shape = weights.shape(f"{last}.weight")
    labels = shape[0] if len(shape) == 2 else 0
    listed = config.object("id2label")
    if labels < 1 or (listed and len(listed) != labels):
        raise DamagedEncoderError(
            f"{config.path} names {len(listed)} labels; the classifier has the shape {shape}."
        )
    activation = activation or ("Sigmoid" if labels == 1 else "Identity")
    return *layers, _dense(weights, last, activation, width, labels, last != "score")


def _normed_head(weights: Weights, config: Settings, width: int) -> list[Layer]:
    """ModernBERT's: a dense layer and a layer normalisation, whose biases are settings."""
    name = _HEAD_ACTIVATIONS[config.only("classifier_activation", _HEAD_ACTIVATIONS, "gelu")]
    dense = _dense(weights, "head.dense", name, width, width, config.flag("classifier_bias", False))
    scale, offset = weights.get("head.norm.weight", (width,)), np.zeros(width, np.float32)
    if config.flag("norm_bias", False):
        offset = weights.get("head.norm.bias", (width,))
    return [dense, Norm(scale, offset, config.number("norm_eps", 1e-5, above=0, below=1))]


def _dense(
    weights: Weights, name: str, activation: str, inputs: int, outputs: int, biased: bool = True
) -> Dense:
    weight = weights.get(f"{name}.weight", (outputs, inputs))
    bias = weights.get(f"{name}.bias", (outputs,)) if biased else None
    return Dense(inputs, outputs, activation, weight, bias)


def _token_types(config: Settings, tokenizer: Settings) -> bool:
    """Whether token types tell a pair's texts apart: by the tokenizer's file, else its class."""
    if config.integer("type_vocab_size", 1, least=0) < 2:
        return False
    names = tokenizer.get("model_input_names")
    if names is None:
        return tokenizer_class(tokenizer, config) in ("BertTokenizer", "ElectraTokenizer")
    return isinstance(names, list) and "token_type_ids" in names
