"""What a sentence-transformers directory says about itself.

A model says in JSON files which modules it is made of and how each is configured; this module reads
them and nothing else decides. What is not understood is refused by name: an encoder that leaves a
module out gives vectors of another space without any error.

Sources: ``modules.json``, ``config_sentence_transformers.json`` and the ``config.json`` of each
module, as written by sentence-transformers 0.3 to 6.2 (``base/model.py``, ``base/modules/*.py``,
``sentence_transformer/modules/pooling.py``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbert_pg.distance import SIMILARITIES, Similarity
from sbert_pg.encoder.files import (
    Settings,
    find_weights,
    inside,
    is_there,
    read_if_there,
    read_json,
    read_list,
    require_model,
)
from sbert_pg.encoder.layers import Dense, Layer, Normalize, PoolingMode, read_layers, read_pooling
from sbert_pg.encoder.tensors import without_code
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError

logger = logging.getLogger("sbert_pg.encoder")

#: Names of the transformer's own settings, newest first.
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)

#: The module of a static model, and its architecture.
STATIC = "StaticEmbedding"

#: Settings that choose how torch runs a model and not what it computes.
_HARMLESS_KWARGS = frozenset(
    {"torch_dtype", "dtype", "attn_implementation", "device_map", "add_pooling_layer", "use_cache",
     "cache_dir", "revision", "token", "local_files_only", "trust_remote_code", "low_cpu_mem_usage",
     "use_fast", "model_max_length"}
)  # fmt: skip

#: Entries of ``config.json`` and ``tokenizer_config.json`` that say where the file came from.
_PROVENANCE = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_file"}
)
#: Entries of ``config_sentence_transformers.json`` that a spec has in fields of their own, or that
#: are versions of packages.
IN_SPEC = frozenset(
    {"prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "__version__",
     "model_type"}
)  # fmt: skip
#: Similarity functions by sentence-transformers' names; it spells one of them in two ways.
_SIMILARITIES: dict[str, Similarity] = {
    **{name: name for name in SIMILARITIES},
    "dot_product": "dot",
}
_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: From here on a limit of tokens means none; transformers writes 1e30.
_NO_LIMIT = 10**9
#: Entries of ``modules.json``.
MODULES_LIMIT = 50


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Description:
    """A sentence-transformers model in its own words.

    Attributes:
        configuration: everything that the directory's configuration files say and the other
            attributes do not, what is ignored on purpose included; part of the encoder's identity.
        max_seq_length: tokens read of a text, special tokens included; never more than the
            transformer has positions for. ``None`` where neither the model nor its tokenizer
            names a limit.
        token_types: whether the transformer is given which tokens are of a pair's second text.
    """

    path: Path
    transformer_path: Path
    architecture: str
    config: Settings = field(repr=False)
    configuration: Mapping[str, Any] = field(repr=False)
    weights: tuple[Path, ...]
    pooling: tuple[PoolingMode, ...]
    include_prompt: bool = True
    layers: tuple[Layer, ...]
    max_seq_length: int | None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: Similarity = "cosine"
    truncate_dim: int | None = None
    pairs: bool = False
    token_types: bool = False

    @property
    def full_dimensions(self) -> int:
        """Width of the vector after all layers, before truncation."""
        widths = [layer.out_features for layer in self.layers if isinstance(layer, Dense)]
        return widths[-1] if widths else len(self.pooling) * hidden_size(self.config)

    @property
    def dimensions(self) -> int:
        """Width of the vectors that the model gives by its own settings."""
        return min(self.full_dimensions, self.truncate_dim or self.full_dimensions)

    @property
    def normalized(self) -> bool:
        """Whether the vectors, as the model gives them, have length one."""
        ends_normalized = bool(self.layers) and isinstance(self.layers[-1], Normalize)
        return ends_normalized and self.dimensions == self.full_dimensions


def describe(path: str | Path) -> Description:
    """Read what the sentence-transformers directory at ``path`` says about itself.

    A directory without ``modules.json`` but with a transformer is read as sentence-transformers
    reads it: mean pooling and nothing after it.
    """
    root = Path(path)
    require_model(root)
    modules = modules_of(root)
    transformer_path = inside(root, modules[0][1])
    settings = _transformer_settings(transformer_path)
    own, _ = transformer_of(transformer_path, settings)
    config = own["config"]
    pooling_settings = _pooling_settings(root, modules, config)
    pooling = read_pooling(pooling_settings, hidden_size(config) if modules[1:] else None)
    general = general_of(root)
    return Description(
        path=root,
        configuration={
            **own.pop("configuration"),
            "settings": plain(settings, frozenset()),
            "pooling": plain(pooling_settings, frozenset()),
            "general": plain(general, IN_SPEC),
            "modules": [name for name, _ in modules],
            # All that their own files say, what is ignored on purpose included.
            "layers": [
                dict(read_if_there(inside(root, m) / "config.json")) for _, m in modules[2:]
            ],
        },
        pooling=pooling,
        include_prompt=pooling_settings.flag("include_prompt", True),
        layers=read_layers(root, modules[2:], len(pooling) * hidden_size(config)),
        **own,
        **conventions(general),
    )


def transformer_of(directory: Path, settings: Settings) -> tuple[dict[str, Any], Settings]:
    """What a transformer's own files say, as ``Description`` has it; and of its tokenizer."""
    written = read_json(directory / "config.json")
    config = without_code(written)
    tokenizer = read_if_there(directory / "tokenizer_config.json")
    tokenizer.refuse_code()
    return {
        "transformer_path": directory,
        "architecture": _architecture_of(config),
        "config": config,
        "configuration": {"config": plain(written), "tokenizer": plain(tokenizer)},
        "weights": find_weights(directory),
        "max_seq_length": _max_seq_length(settings, tokenizer, config),
        "do_lower_case": settings.flag("do_lower_case", False),
    }, tokenizer


def plain(settings: Settings, without: frozenset[str] = _PROVENANCE) -> dict[str, Any]:
    """A file's entries without those that say where it came from."""
    return {key: value for key, value in settings.items() if key not in without}


def _architecture_of(config: Settings) -> str:
    """The transformer's ``model_type``."""
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise UnsupportedEncoderError(
            f"{config.path}: 'model_type' is {str(architecture)[:80]!r}, which is not the name of "
            "an architecture."
        )
    return architecture


def hidden_size(config: Settings) -> int:
    """Width of a token's vector, by whichever name the architecture has for it."""
    for key in ("hidden_size", "dim", "d_model"):
        if config.get(key) is not None:
            return config.integer(key)
    raise UnsupportedEncoderError(
        f"{config.path}: architecture {config.get('model_type')!r} names no 'hidden_size'."
    )


def padding_id(config: Settings) -> int:
    """The token from which RoBERTa and its kin count positions."""
    return config.integer("pad_token_id", 1, least=0)


def _module(listing: Path, number: int, entry: Any) -> tuple[str, str]:
    """Class name and path of one module of ``modules.json``."""
    if not isinstance(entry, dict):
        raise DamagedEncoderError(f"{listing}: module {number} is not an object.")
    module = Settings(entry, listing)
    type_name, path = module.text("type"), module.text("path")
    package, _, name = type_name.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise UnsupportedEncoderError(
            f"{listing} names the module {type_name!r}, which is code of the model repository. "
            "Code from model repositories is never run."
        )
    return name, path


def modules_of(root: Path) -> list[tuple[str, str]]:
    """Class name and path of each module, in order; dropout does nothing and is left out."""
    listing = root / "modules.json"
    if not is_there(listing):
        return _lone_transformer(root)
    entries = read_list(listing, MODULES_LIMIT)
    modules = [_module(listing, number, entry) for number, entry in enumerate(entries)]
    modules = [(name, path) for name, path in modules if name != "Dropout"]
    names = [name for name, _ in modules]
    if names[:1] != [STATIC] and names[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedEncoderError(
            f"{listing} lists the modules {', '.join(names) or 'none'}. Supported is a Transformer "
            f"followed by Pooling, or {STATIC}, and then any of Dense and Normalize. A Transformer "
            "alone may be a cross-encoder, which Reranker.load loads."
        )
    return modules


def _lone_transformer(root: Path) -> list[tuple[str, str]]:
    """A directory without ``modules.json``: model2vec's, a plain transformer, a partial copy."""
    config = read_json(root / "config.json")
    if config.get("model_type") == "model2vec":
        normalize = [("Normalize", "1_Normalize")] if config.flag("normalize", False) else []
        return [(STATIC, ""), *normalize]
    kind = first_architecture(config)
    if kind.endswith(
        ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    ):
        raise UnsupportedEncoderError(
            f"{root} is a {kind} without modules.json: a cross-encoder or another task's model, "
            "which gives scores and no vectors. Reranker.load loads cross-encoders."
        )
    companions = ("config_sentence_transformers.json", *TRANSFORMER_FILES, "1_Pooling/config.json")
    left = [name for name in companions if is_there(root / name)]
    if left:
        raise DamagedEncoderError(
            f"{root} holds {left[0]} and no modules.json, which sentence-transformers writes with "
            "it: a copy in part. Copy that file too, with the directories that it names; a plain "
            "transformer has neither."
        )
    logger.warning(
        "%s has no modules.json. It is read as sentence-transformers reads a plain transformer, "
        "with mean pooling and without normalisation; where it is a copy of a "
        "sentence-transformers model, copy that file and the directories that it names too.",
        root,
    )
    return [("Transformer", "")]


def first_architecture(config: Settings) -> str:
    """The class of the model that was saved, or an empty text."""
    names = config.get("architectures") or [""]
    return str(names[0]) if isinstance(names, list) and names else ""


def _transformer_settings(directory: Path) -> Settings:
    names = [name for name in TRANSFORMER_FILES if (directory / name).is_file()]
    settings = read_if_there(directory / (names or TRANSFORMER_FILES)[0])
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedEncoderError(
            f"{directory} is a PEFT adapter. Merge it into its base model and save the result."
        )
    for key in ("query_length", "document_length", "query_expansion"):
        settings.only(key, [0, False, ""], 0)
    settings.only("transformer_task", ["feature-extraction"], "feature-extraction")
    settings.only("module_output_name", ["token_embeddings"], "token_embeddings")
    modalities = settings.object("modality_config")
    if modalities:
        modalities.object("text").only("method_output_name", ["last_hidden_state"])
    require_harmless(settings)
    return settings


def require_harmless(settings: Settings) -> None:
    """Refuse arguments for transformers that could change what a model computes."""
    for key in ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args",
                "processor_kwargs"):  # fmt: skip
        unknown = set(settings.object(key)) - _HARMLESS_KWARGS
        if unknown:
            raise UnsupportedEncoderError(
                f"{settings.path} passes {', '.join(sorted(unknown))} in {key!r}, which is not "
                "supported."
            )


def _pooling_settings(root: Path, modules: Sequence[tuple[str, str]], config: Settings) -> Settings:
    """The pooling module's configuration, or what sentence-transformers does without one."""
    if len(modules) > 1:
        settings = read_json(inside(root, modules[1][1]) / "config.json")
        if "include_prompt" in settings:  # null is true for nobody
            settings.only("include_prompt", [True, False])
        return settings
    causal = first_architecture(config).endswith("ForCausalLM") and config.flag("is_causal", True)
    return Settings({"pooling_mode": "lasttoken" if causal else "mean"}, config.path)


def general_of(root: Path) -> Settings:
    """What ``config_sentence_transformers.json`` says, empty without one."""
    settings = read_if_there(root / "config_sentence_transformers.json")
    settings.only("model_type", ["SentenceTransformer"], "SentenceTransformer")
    return settings


def conventions(general: Settings) -> dict[str, Any]:
    """Prompts, similarity and truncation, as ``Description`` has them."""
    texts = general.object("prompts")
    prompts = {name: texts.text(name, "") for name in texts}
    default = general.text("default_prompt_name", None)
    if default is not None and default not in prompts:
        raise DamagedEncoderError(
            f"{general.path} has the default prompt {default!r}, which is not among its prompts "
            f"{sorted(prompts)}."
        )
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": _SIMILARITIES[general.only("similarity_fn_name", _SIMILARITIES, "cosine")],
        "truncate_dim": general.integer("truncate_dim", None),
    }


def _max_seq_length(settings: Settings, tokenizer: Settings, config: Settings) -> int | None:
    """The limit of a text in tokens: as in sentence-transformers its own, else the tokenizer's.

    But a limit above what the transformer has positions for is lowered to it, where they are a
    table: sentence-transformers fails on such a text with an index error.
    """
    nested = [settings.object(key) for key in ("processor_kwargs", "tokenizer_args")]
    places = [(place, "model_max_length") for place in nested]
    places += [(settings, "max_seq_length"), (tokenizer, "model_max_length")]
    limits = (
        place.integer(key, most=10**40) for place, key in places if place.get(key) is not None
    )
    own, positions = next(limits, _NO_LIMIT), _positions(config)
    limit = own if positions is None else min(own, positions)
    return None if limit >= _NO_LIMIT else limit


def _is_relative(config: Settings) -> bool:
    """Whether positions are turned or weighed, and none has its own vector."""
    if config.get("position_embedding_type") in ("rope", "rotary", "alibi"):
        return True
    return any(key.startswith(("rope_", "rotary_")) or key.endswith("rope_theta")
               for key, value in config.items() if value)  # fmt: skip


def _positions(config: Settings) -> int | None:
    """Tokens that the transformer has positions for, or ``None`` where nothing but memory ends."""
    if config["model_type"] in ("modernbert", "nomic_bert", "gte") or _is_relative(config):
        return None
    positions = config.integer("max_position_embeddings", None, least=-1)
    if positions is None or positions <= 0:  # DeBERTa writes -1 or 0 for none
        return None
    if config["model_type"] in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Positions are counted from the padding index plus one.
        positions -= padding_id(config) + 1
        if positions < 1:
            config.refuse("max_position_embeddings", "larger than 'pad_token_id' and one more")
    return positions
