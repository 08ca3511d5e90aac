"""Static models: a vector for each token, and of a text their mean.

The files of sentence-transformers' ``StaticEmbedding`` and of model2vec. A directory with
``modules.json`` means what sentence-transformers makes of it, one without what model2vec does: it
reads ``max_length`` tokens, and of a text only so many characters as these have by the median of
the vocabulary; and it leaves out tokens that are unknown. Sources:
``sentence_transformer/modules/static_embedding.py`` of sentence-transformers 6.2, ``model.py`` of
model2vec 0.10.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder.description import (
    IN_SPEC,
    STATIC,
    Description,
    conventions,
    describe,
    general_of,
    modules_of,
    plain,
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
    require_model,
)
from sbert_pg.encoder.layers import read_layers
from sbert_pg.encoder.tokenizing import MODEL2VEC, own_errors
from sbert_pg.errors import DamagedEncoderError

#: Tokens that model2vec reads where its configuration does not say.
_MAX_LENGTH = 512


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
    if not _of_model2vec(root):
        truncation = read_json(where / "tokenizer.json", JSON_LIMIT).object("truncation")
        return truncation.integer("max_length", None)
    unlimited = "max_length" in config and config["max_length"] is None
    return None if unlimited else config.integer("max_length", _MAX_LENGTH)


def _of_model2vec(root: Path) -> bool:
    return not (root / "modules.json").is_file()


def table(paths: tuple[Path, ...]) -> Array:
    """The vector of each token, ``(tokens, width)``, with model2vec's mapping and weights in it.

    Raises:
        DamagedEncoderError: tensors are missing or do not fit each other.
    """
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


def static_tokenizer(description: Description) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of a static model, without special tokens.

    Raises:
        DamagedEncoderError: it cannot be read.
    """
    from tokenizers import Tokenizer

    path = description.transformer_path / "tokenizer.json"
    content = dict(read_json(path, JSON_LIMIT))
    content["post_processor"] = None
    with own_errors(DamagedEncoderError, f"{path} cannot be read"):
        vocabulary = Tokenizer.from_str(json.dumps(content)).get_vocab()
    count = description.config.integer("vocab_size")
    if max(vocabulary.values(), default=0) >= count:
        raise DamagedEncoderError(
            f"{description.weights[0]} has vectors for {count} tokens; {path} has more."
        )
    if not _of_model2vec(description.path):
        return content
    limit, model = description.max_seq_length, content["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")
    characters = int(np.median([len(token) for token in vocabulary]))
    content[MODEL2VEC] = {
        "characters": None if limit is None else limit * characters,
        "dropped": vocabulary.get(unknown) if isinstance(unknown, str) else unknown,
    }
    return content
