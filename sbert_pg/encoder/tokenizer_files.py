"""The tokenizer that a model's files mean.

``tokenizer.json`` as the model's repository has it is not yet the tokenizer that transformers uses:
``tokenizer_config.json`` overrides its casing and its leading blank, and sentence-transformers may
put lower-casing in front. ``tokenizer_content`` settles that once, at conversion.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sbert_pg.encoder.description import STATIC, Description
from sbert_pg.encoder.files import JSON_LIMIT, Settings, is_there, read_if_there, read_json
from sbert_pg.encoder.tokenizing import MODEL2VEC, own_errors, require_bounded
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError, needing

#: Classes of transformers that rebuild BERT's normaliser from ``tokenizer_config.json`` with these
#: defaults (transformers ``models/bert/tokenization_bert.py``, and the same in DistilBERT, MPNet).
_BERT_LIKE = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer",
              "FunnelTokenizer", "LayoutLMTokenizer", "LxmertTokenizer", "MobileBertTokenizer",
              "SqueezeBertTokenizer")  # fmt: skip
_BERT_DEFAULTS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_BERT_KEYS = {
    "do_lower_case": "lowercase",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "strip_accents": "strip_accents",
}
#: Classes that rebuild the pre-tokenizer from ``add_prefix_space`` there: with ``ByteLevel``, and
#: with ``Metaspace`` (``models/roberta/tokenization_roberta.py``, ``models/xlm_roberta``...).
_BYTE_LEVEL = ("RobertaTokenizer", "GPT2Tokenizer", "DebertaTokenizer", "LukeTokenizer",
               "Qwen2Tokenizer", "BartTokenizer", "LEDTokenizer", "LongformerTokenizer",
               "MvpTokenizer")  # fmt: skip
_METASPACE = ("XLMRobertaTokenizer", "CamembertTokenizer", "AlbertTokenizer", "BarthezTokenizer",
              "RemBertTokenizer", "DebertaV2Tokenizer", "BigBirdTokenizer")  # fmt: skip
#: Classes that, from transformers 5 on, build normaliser and pre-tokenizer again and take nothing
#: but the table of characters from ``tokenizer.json``. transformers 4 took the file as it is, and
#: some of its files differ: blanks in a row and at the ends of a text were tokens of their own.
_SENTENCEPIECE = ("XLMRobertaTokenizer", "CamembertTokenizer", "T5Tokenizer")
#: Classes that take ``tokenizer.json`` as it is.
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")
#: Classes by ``model_type``, where no file names one.
_BY_ARCHITECTURE = MappingProxyType(
    {**dict.fromkeys(("bert", "distilbert", "electra", "nomic_bert"), "BertTokenizer"),
     **dict.fromkeys(("xlm-roberta", "gte"), "XLMRobertaTokenizer"),
     "albert": "AlbertTokenizer", "camembert": "CamembertTokenizer", "mpnet": "MPNetTokenizer",
     "qwen3": "Qwen2Tokenizer", "roberta": "RobertaTokenizer", "t5": "T5Tokenizer"}
)  # fmt: skip


def tokenizer_class(tokenizer: Settings, config: Settings) -> str:
    """The class that transformers takes, without ``Fast``; empty where that is a general one."""
    named = tokenizer.text("tokenizer_class", None) or config.text("tokenizer_class", None)
    default = _BY_ARCHITECTURE.get(str(config.get("model_type")), "")
    return (named or default).removesuffix("Fast")


def tokenizer_content(description: Description) -> dict[str, Any]:
    """The tokenizer that transformers would use, as the content of a ``tokenizer.json``."""
    directory = description.transformer_path
    config = read_if_there(directory / "tokenizer_config.json")
    path = directory / "tokenizer.json"
    if description.architecture == STATIC:
        content = _static(description)
        with own_errors(DamagedEncoderError, f"{path} cannot be read"):
            require_bounded(content)
    elif is_there(path):
        content = dict(read_json(path, JSON_LIMIT))
        with own_errors(DamagedEncoderError, f"{path} cannot be read"):
            content = _as_configured(
                content, tokenizer_class(config, description.config), config, path
            )
            require_bounded(content)
    else:
        content = _converted_by_transformers(directory)
    with own_errors(DamagedEncoderError, f"{path} cannot be read"):
        _require_vocabulary(content, description, path)
    content["truncation"] = content["padding"] = None
    if description.do_lower_case:
        content["normalizer"] = _with_lower_case(content.get("normalizer"))
    _try_expressions(content, path)
    return content


def is_model2vec(root: Path) -> bool:
    """Whether the directory of a static model means what model2vec makes of it."""
    return not (root / "modules.json").is_file()


def _static(description: Description) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of a static model, without special tokens."""
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
    if not is_model2vec(description.path):
        return content
    limit, model = description.max_seq_length, content["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")
    characters = int(np.median([len(token) for token in vocabulary]))
    content[MODEL2VEC] = {
        "characters": None if limit is None else limit * characters,
        "dropped": vocabulary.get(unknown) if isinstance(unknown, str) else unknown,
    }
    return content


def _require_vocabulary(content: Mapping[str, Any], description: Description, path: Path) -> None:
    """Refuse a tokenizer that knows no words, or words that the model has no vectors for.

    transformers makes one without words where the files that list them are missing.
    """
    words = content["model"]["vocab"]
    ids = words.values() if isinstance(words, dict) else range(len(words))
    names = set(words) if isinstance(words, dict) else {word for word, _ in words}
    if not names.difference(token["content"] for token in content.get("added_tokens") or ()):
        raise DamagedEncoderError(
            f"{path.parent} has no vocabulary: {path.name} or the files that it is made from "
            "(vocab.txt, a sentencepiece model...) are missing or empty. Copy them too."
        )
    rows = description.config.get("vocab_size")
    if description.architecture != STATIC and isinstance(rows, int) and max(ids) >= rows:
        raise DamagedEncoderError(
            f"{path}: 'vocab' has the id {max(ids)}, and the model has vectors for {rows} tokens, "
            "0 to the last; the tokenizer is of another model."
        )


def truncation_side(description: Description) -> str:
    """Which end of a long text is cut off, ``"right"`` or ``"left"``."""
    directory = description.transformer_path
    config = read_if_there(directory / "tokenizer_config.json")
    static = description.architecture == STATIC
    side = None if static else config.text("truncation_side", None)
    if side is None and (directory / "tokenizer.json").is_file():
        kept = read_json(directory / "tokenizer.json", JSON_LIMIT).object("truncation")
        side = kept.text("direction", "right").lower()
    if side not in (None, "right", "left"):
        config.refuse("truncation_side", "'right' or 'left'")
    return side or "right"


def _as_configured(
    content: dict[str, Any], name: str, config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer" and name in _BERT_LIKE:
        changes = {
            key: config.get(setting, _BERT_DEFAULTS[setting]) for setting, key in _BERT_KEYS.items()
        }
        content["normalizer"] = {**normalizer, **changes}
    prefix = config.get("add_prefix_space")
    if name in _SENTENCEPIECE and content["model"]["type"] == "Unigram":
        return {**content, **_sentencepiece(normalizer, name == "T5Tokenizer" or prefix)}
    for part in _pre_tokenizers(content.get("pre_tokenizer")):
        _follow_prefix(part, name, prefix, path)
    return content


def _sentencepiece(normalizer: Mapping[str, Any], prefix: Any) -> dict[str, Any]:
    """Normaliser and pre-tokenizer as the classes of ``_SENTENCEPIECE`` build them."""
    parts = normalizer.get("normalizers", [normalizer])
    characters = [part for part in parts if part.get("type") == "Precompiled"]
    scheme = "always" if prefix is None or prefix else "never"
    metaspace = {"replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    split = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **metaspace}]
    return {
        "normalizer": characters[0] if characters else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
    }


def _follow_prefix(part: dict[str, Any], name: str, prefix: Any, path: Path) -> None:
    """Whether a blank is put before a text: by the class, where it builds this part again."""
    rebuilt: tuple[str, ...]
    is_byte_level = part["type"] == "ByteLevel"
    if is_byte_level:
        stored, rebuilt, default = part.get("add_prefix_space", True), _BYTE_LEVEL, False
    elif part["type"] == "Metaspace":
        stored, rebuilt, default = part.get("prepend_scheme") != "never", _METASPACE, True
    else:
        return
    asked = default if prefix is None else bool(prefix)
    if asked == stored:
        return
    if name in rebuilt:
        scheme = {"prepend_scheme": "always" if asked else "never"}
        part.update({"add_prefix_space": asked} if is_byte_level else scheme)
    elif name not in _GENERIC and prefix is not None:
        raise UnsupportedEncoderError(
            f"{path.with_name('tokenizer_config.json')}: 'add_prefix_space' is {prefix!r}, "
            f"which {path.name} contradicts, and which of them {name} follows is not known. "
            "Make them agree."
        )


def _pre_tokenizers(pre_tokenizer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _pre_tokenizers(part)
    else:
        yield pre_tokenizer


_TRIAL = r"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
except ImportError:
    pass
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str(sys.stdin.buffer.read().decode())
for piece in ("a", "A", "1", " ", "\n", "é", "!", "aA", "a1", "a ", "a!", "_-", "\u4eca", "x=1;\n"):
    tokenizer.encode((piece * 4000)[:4000] + "\0")
"""
#: Seconds that a trial may take, its start included.
_TRIAL_SECONDS = 12


def _try_expressions(content: Mapping[str, Any], path: Path) -> None:
    """Refuse expressions that never end on a repetitive text, tried in a process of their own."""
    parts = [content.get(key) for key in ("normalizer", "pre_tokenizer")]
    if '"Regex"' not in json.dumps(parts) or not sys.executable:
        return
    try:
        subprocess.run(
            [sys.executable, "-c", _TRIAL], check=True,
            input=json.dumps({k: v for k, v in content.items() if k != MODEL2VEC}).encode(),
            capture_output=True, timeout=_TRIAL_SECONDS,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        ended = getattr(error, "stderr", None) or b""
        reason = ended.decode(errors="replace").strip().splitlines()[-1:] or [str(error)[-80:]]
        raise DamagedEncoderError(
            f"{path}: its regular expressions cannot be used on repetitive texts: {reason[0][:200]}"
        ) from error


def _with_lower_case(normalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """As sentence-transformers does it: before everything else, unless it is there already."""
    if normalizer is None:
        return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    if normalizer.get("type") == "Lowercase":
        return dict(normalizer)
    parts = list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]
    if any(part.get("type") == "Lowercase" for part in parts):
        return dict(normalizer)
    return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *parts]}


def _converted_by_transformers(directory: Path) -> dict[str, Any]:
    purpose = f"make {directory / 'tokenizer.json'} from older files"
    with needing("transformers", "export", purpose):
        from transformers import AutoTokenizer
    try:
        backend = AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
        content: dict[str, Any] = json.loads(backend.to_str())
    # transformers raises whatever its many tokenizers raise.
    except Exception as error:
        raise DamagedEncoderError(
            f"{directory} holds no tokenizer.json, and none can be made: {error}."
        ) from error
    return content
