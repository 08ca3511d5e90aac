"""Cross-encoders: a transformer with a classifier, which scores a pair of texts.

A classifier is what follows pooling, as the layers of an encoder are: dense layers over the first
token. So a cross-encoder is a ``Description`` too, whose "vector" are its scores. Sources:
``*ForSequenceClassification`` in transformers' models; ``cross_encoder/model.py`` of
sentence-transformers 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sbert_pg.encoder.description import (
    TRANSFORMER_FILES,
    Description,
    architecture_of,
    hidden_size,
    max_seq_length,
    plain,
    require_harmless,
)
from sbert_pg.encoder.files import (
    Settings,
    Weights,
    find_weights,
    parse_json,
    read_bytes,
    read_if_there,
    read_json,
    require_model,
)
from sbert_pg.encoder.layers import Dense, torch_class
from sbert_pg.encoder.tokenizer_files import tokenizer_class
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError
from sbert_pg.probes import SAMPLE_TEXTS

#: Pairs on which forms of one cross-encoder are compared and ranges of int8 are chosen.
SAMPLE_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (SAMPLE_TEXTS[number], SAMPLE_TEXTS[(number + step) % len(SAMPLE_TEXTS)])
    for step in (0, 1, 7)
    for number in range(len(SAMPLE_TEXTS))
)


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands over the first token: a dense layer with an activation, and the classifier."""

    dense: str
    activation: str
    classifier: str


_POOLER = _Head("pooler.dense", "Tanh", "classifier")
_PROJECTED = _Head("classifier.dense", "Tanh", "classifier.out_proj")
#: By ``model_type``.
_HEADS: Mapping[str, _Head] = {
    "bert": _POOLER,
    "distilbert": _Head("pre_classifier", "ReLU", "classifier"),
    "roberta": _PROJECTED,
    "xlm-roberta": _PROJECTED,
    "camembert": _PROJECTED,
    "mpnet": _PROJECTED,
    "albert": _Head("pooler", "Tanh", "classifier"),
    "electra": _Head("classifier.dense", "GELU", "classifier.out_proj"),
}
#: Activations of a score, by the name of torch's class.
_ACTIVATIONS = ("Identity", "Sigmoid")


def describe_reranker(path: str | Path) -> Description:
    """Read what the directory of a cross-encoder at ``path`` says about itself.

    Raises:
        EncoderNotFoundError: there is no such directory, or no model in it.
        DamagedEncoderError: a file that another one names is missing or unreadable.
        UnsupportedEncoderError: it is not a cross-encoder, or asks for something not implemented.
    """
    root = Path(path)
    require_model(root)
    _require_lone_transformer(root / "modules.json")
    config, general = read_json(root / "config.json"), _general(root)
    tokenizer = read_if_there(root / "tokenizer_config.json")
    settings = read_if_there(root / TRANSFORMER_FILES[0])
    for file in (config, tokenizer):
        file.refuse_code()
    settings.only("transformer_task", ["sequence-classification"], "sequence-classification")
    require_harmless(settings)
    architecture = architecture_of(config)
    names = config.get("architectures") or [""]
    kind = str(names[0]) if isinstance(names, list) and names else ""
    if architecture not in _HEADS or not kind.endswith("ForSequenceClassification"):
        raise UnsupportedEncoderError(
            f"{config.path}: {kind or architecture!r} is not a cross-encoder that is implemented; "
            f"implemented are sequence classifiers of {', '.join(_HEADS)}. Encoders are loaded "
            "with Encoder.load."
        )
    weights = find_weights(root)
    layers = _layers(Weights(weights), config, _HEADS[architecture], _activation(general, config))
    return Description(
        path=root,
        transformer_path=root,
        architecture=architecture,
        config=config,
        configuration={
            "config": plain(config), "tokenizer": plain(tokenizer), "settings": plain(settings),
            "general": plain(general), "modules": ["Transformer", "Classifier"],
        },
        weights=weights,
        pooling=("cls",),
        layers=layers,
        max_seq_length=max_seq_length(settings, tokenizer, config),
        do_lower_case=settings.flag("do_lower_case", False),
        pairs=True,
        token_types=_token_types(config, tokenizer),
    )  # fmt: skip


def _require_lone_transformer(listing: Path) -> None:
    if not listing.is_file():
        return
    modules = parse_json(read_bytes(listing), str(listing))
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
    """The activation of the scores; ``None`` where sentence-transformers chooses by their number.

    Raises:
        UnsupportedEncoderError: it is not one of torch's that are implemented.
    """
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


def _layers(
    weights: Weights, config: Settings, head: _Head, activation: str | None
) -> tuple[Dense, Dense]:
    width = hidden_size(config)
    dense = _dense(weights, head.dense, head.activation, width, width)
    shape = weights.shape(f"{head.classifier}.weight")
    labels = shape[0] if len(shape) == 2 else 0
    listed = config.object("id2label")
    if labels < 1 or (listed and len(listed) != labels):
        raise DamagedEncoderError(
            f"{config.path} names {len(listed)} labels; the classifier has the shape {shape}."
        )
    activation = activation or ("Sigmoid" if labels == 1 else "Identity")
    return dense, _dense(weights, head.classifier, activation, width, labels)


def _dense(weights: Weights, name: str, activation: str, inputs: int, outputs: int) -> Dense:
    weight = weights.get(f"{name}.weight", (outputs, inputs))
    return Dense(inputs, outputs, activation, weight, weights.get(f"{name}.bias", (outputs,)))


def _token_types(config: Settings, tokenizer: Settings) -> bool:
    """Whether the two texts of a pair are distinguished by their token types.

    The tokenizer decides what the transformer is given; where it does not say, its class in
    transformers does, and where it has none, the architecture's own.
    """
    if config.integer("type_vocab_size", 1, least=0) < 2:
        return False
    names = tokenizer.get("model_input_names")
    if names is None:
        return tokenizer_class(tokenizer, config) in ("BertTokenizer", "ElectraTokenizer")
    return isinstance(names, list) and "token_type_ids" in names
