"""What a sentence-transformers directory says about itself.

A model says in JSON files which modules it is made of and how each is configured; this module reads
them and nothing else decides. What is not understood is refused by name: an encoder that leaves a
module out gives vectors of another space without any error.

Sources: ``modules.json``, ``config_sentence_transformers.json`` and the ``config.json`` of each
module, as written by sentence-transformers 0.3 to 6.2 (``base/model.py``, ``base/modules/*.py``,
``sentence_transformer/modules/pooling.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from sbert_pg.distance import SIMILARITIES, Similarity
from sbert_pg.encoder.layers import (
    ACTIVATIONS,
    Dense,
    Layer,
    Normalize,
    find_weights,
    inside,
    read_json,
    read_layers,
)
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError, UnsupportedEncoderError

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

#: Older keys of a pooling configuration, in the order in which their vectors are concatenated.
_POOLING_KEYS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLING_MODES: tuple[PoolingMode, ...] = tuple(_POOLING_KEYS.values())

#: Names of the transformer's own settings, newest first.
_TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)

#: Settings that choose how torch runs a model and not what it computes.
_HARMLESS_KWARGS = frozenset(
    {"torch_dtype", "dtype", "attn_implementation", "device_map", "add_pooling_layer", "use_cache",
     "cache_dir", "revision", "token", "local_files_only", "trust_remote_code", "low_cpu_mem_usage",
     "use_fast", "model_max_length"}
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Description:
    """A sentence-transformers model in its own words.

    Attributes:
        path: the directory.
        transformer_path: where the transformer's configuration, weights and tokenizer are.
        architecture: ``model_type`` of the transformer (``"bert"``, ``"mpnet"``...).
        config: the transformer's ``config.json``.
        weights: safetensors files of the transformer.
        pooling: pooling modes in the order of concatenation.
        include_prompt: whether pooling sees the tokens of the prompt.
        layers: what follows pooling, in order.
        max_seq_length: tokens read of a text, special tokens included; never more than the
            transformer has positions for. ``None`` where neither the model nor its tokenizer
            names a limit.
        do_lower_case: whether texts are put in lower case before the tokenizer.
        prompts: texts by name.
        default_prompt_name: prompt that ``encode`` uses where none is asked for.
        similarity: similarity function that the model was made for.
        truncate_dim: dimensions kept of each vector, or ``None`` for all.
    """

    path: Path
    transformer_path: Path
    architecture: str
    config: Mapping[str, Any] = field(repr=False)
    weights: tuple[Path, ...]
    pooling: tuple[PoolingMode, ...]
    include_prompt: bool
    layers: tuple[Layer, ...]
    max_seq_length: int | None
    do_lower_case: bool
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    similarity: Similarity
    truncate_dim: int | None

    @property
    def pooled_dimensions(self) -> int:
        """Width of the vector that pooling gives."""
        return len(self.pooling) * hidden_size(self.config)

    @property
    def full_dimensions(self) -> int:
        """Width of the vector after all layers, before truncation."""
        width = self.pooled_dimensions
        for layer in self.layers:
            width = layer.out_features if isinstance(layer, Dense) else width
        return width

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

    Raises:
        EncoderNotFoundError: there is no such directory, or no model in it.
        DamagedEncoderError: a file that another one names is missing or unreadable.
        UnsupportedEncoderError: the model asks for something that is not implemented.
    """
    root = Path(path)
    if not root.is_dir():
        raise EncoderNotFoundError(
            f"There is no directory {str(root)!r}. Give the path of a sentence-transformers "
            "directory, of a converted encoder, or a hub name such as "
            "'sentence-transformers/all-MiniLM-L6-v2'."
        )
    modules = _modules(root)
    transformer_path = inside(root, modules[0][1])
    settings = _transformer_settings(transformer_path)
    config = read_json(transformer_path / "config.json")
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise UnsupportedEncoderError(
            f"{transformer_path / 'config.json'} names no 'model_type', so the architecture is "
            "not known."
        )
    pooling, include_prompt = _pooling(root, modules, config)
    general = _general(root)
    return Description(
        path=root,
        transformer_path=transformer_path,
        architecture=architecture,
        config=config,
        weights=find_weights(transformer_path),
        pooling=pooling,
        include_prompt=include_prompt,
        layers=read_layers(root, modules[2:], len(pooling) * hidden_size(config)),
        max_seq_length=_max_seq_length(transformer_path, settings, config),
        do_lower_case=bool(settings.get("do_lower_case", False)),
        prompts=_prompts(root, general),
        default_prompt_name=general.get("default_prompt_name"),
        similarity=_similarity(root, general),
        truncate_dim=general.get("truncate_dim"),
    )


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of a token's vector, by whichever name the architecture has for it."""
    for key in ("hidden_size", "dim", "d_model"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise UnsupportedEncoderError(
        f"The configuration of architecture {config.get('model_type')!r} names no hidden size."
    )


def _modules(root: Path) -> list[tuple[str, str]]:
    """Class name and path of each module, in order; dropout does nothing and is left out."""
    listing = root / "modules.json"
    if not listing.is_file():
        if (root / "config.json").is_file():
            return [("Transformer", "")]
        raise EncoderNotFoundError(
            f"{root} holds neither modules.json nor config.json, so it is not a "
            "sentence-transformers directory."
        )
    try:
        data = json.loads(listing.read_text(encoding="utf-8"))
        found = [(str(module["type"]), str(module["path"])) for module in data]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEncoderError(f"{listing} cannot be read: {error}.") from error
    modules = []
    for type_name, path in found:
        package, _, name = type_name.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers":
            raise UnsupportedEncoderError(
                f"{listing} names the module {type_name!r}, which is code of the model repository. "
                "Code from model repositories is never run."
            )
        if name != "Dropout":
            modules.append((name, path))
    names = [name for name, _ in modules]
    if names[:1] != ["Transformer"] or names[1:2] != ["Pooling"]:
        raise UnsupportedEncoderError(
            f"{listing} lists the modules {', '.join(names) or 'none'}. Supported is a Transformer "
            "followed by Pooling and then any of Dense and Normalize."
        )
    return modules


def _transformer_settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in _TRANSFORMER_SETTINGS:
        if (directory / name).is_file():
            settings = read_json(directory / name)
            break
    where = directory / "sentence_bert_config.json"
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedEncoderError(
            f"{directory} is a PEFT adapter. Merge it into its base model and save the result."
        )
    for key in ("query_length", "document_length", "query_expansion"):
        if settings.get(key):
            raise UnsupportedEncoderError(f"{where} sets {key!r}, which is not supported.")
    task = settings.get("transformer_task", "feature-extraction")
    output = settings.get("module_output_name", "token_embeddings")
    modalities = settings.get("modality_config") or {}
    text = modalities.get("text", {})
    if (
        task != "feature-extraction"
        or output != "token_embeddings"
        or (modalities and text.get("method_output_name") != "last_hidden_state")
    ):
        raise UnsupportedEncoderError(
            f"{where} asks for task {task!r}, output {output!r} and modalities "
            f"{sorted(modalities)}; supported are the token embeddings of a text encoder."
        )
    for key in ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args",
                "processor_kwargs"):  # fmt: skip
        unknown = set(settings.get(key) or {}) - _HARMLESS_KWARGS
        if unknown:
            raise UnsupportedEncoderError(
                f"{where} passes {', '.join(sorted(unknown))} in {key!r}, which is not supported."
            )
    return settings


def _pooling(
    root: Path, modules: Sequence[tuple[str, str]], config: Mapping[str, Any]
) -> tuple[tuple[PoolingMode, ...], bool]:
    if len(modules) == 1:
        causal = str((config.get("architectures") or [""])[0]).endswith("ForCausalLM")
        return ("lasttoken" if causal and config.get("is_causal", True) else "mean",), True
    where = inside(root, modules[1][1]) / "config.json"
    data = read_json(where)
    modes = data.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _POOLING_KEYS.items() if data.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown or not modes:
        raise UnsupportedEncoderError(
            f"{where} asks for pooling {unknown or modes!r}; supported are "
            f"{', '.join(POOLING_MODES)}."
        )
    width = data.get("embedding_dimension", data.get("word_embedding_dimension"))
    if width is not None and width != hidden_size(config):
        raise DamagedEncoderError(
            f"{where} pools vectors of width {width}; the transformer gives {hidden_size(config)}."
        )
    return tuple(modes), bool(data.get("include_prompt", True))


def _general(root: Path) -> dict[str, Any]:
    path = root / "config_sentence_transformers.json"
    data = read_json(path) if path.is_file() else {}
    kind = data.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UnsupportedEncoderError(f"{root} is a {kind}, not a SentenceTransformer.")
    return data


def _prompts(root: Path, general: Mapping[str, Any]) -> dict[str, str]:
    prompts = {name: text or "" for name, text in (general.get("prompts") or {}).items()}
    default = general.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise DamagedEncoderError(
            f"{root} has the default prompt {default!r}, which is not among its prompts "
            f"{sorted(prompts)}."
        )
    return prompts


def _similarity(root: Path, general: Mapping[str, Any]) -> Similarity:
    name = general.get("similarity_fn_name") or "cosine"
    # Two spellings of one function in sentence-transformers' enumeration.
    name = {"dot_product": "dot"}.get(name, name)
    if name not in SIMILARITIES:
        raise UnsupportedEncoderError(
            f"{root} has the similarity function {name!r}; supported are {', '.join(SIMILARITIES)}."
        )
    return cast(Similarity, name)


def _max_seq_length(
    directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> int | None:
    """As sentence-transformers: its own setting, else the tokenizer's capped by the positions.

    Beyond that, a limit above what the transformer has positions for is lowered to it:
    sentence-transformers fails on such a text with an index error.
    """
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        positions = None
    elif config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Positions are counted from the padding index plus one.
        positions -= int(config.get("pad_token_id", 1)) + 1
    nested = {**(settings.get("tokenizer_args") or {}), **(settings.get("processor_kwargs") or {})}
    limit = nested.get("model_max_length", settings.get("max_seq_length"))
    tokenizer = directory / "tokenizer_config.json"
    if limit is None and tokenizer.is_file():
        limit = read_json(tokenizer).get("model_max_length")
    limits = [int(value) for value in (limit, positions) if value is not None and value < 10**9]
    return min(limits, default=None)


__all__ = [
    "ACTIVATIONS",
    "POOLING_MODES",
    "Dense",
    "Description",
    "Layer",
    "Normalize",
    "PoolingMode",
    "describe",
    "find_weights",
    "hidden_size",
    "read_json",
]
