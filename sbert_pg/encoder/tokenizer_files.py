"""The tokenizer that a model's files mean.

``tokenizer.json`` as the model's repository has it is not yet the tokenizer that transformers uses:
``tokenizer_config.json`` overrides its casing and its leading blank, and sentence-transformers may
put lower-casing in front. ``tokenizer_content`` settles that once, at conversion.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sbert_pg.encoder.description import STATIC, Description
from sbert_pg.encoder.files import JSON_LIMIT, Settings, is_there, read_if_there, read_json
from sbert_pg.encoder.tokenizing import MODEL2VEC, own_errors, parts_of, require_bounded
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
#: Classes that rebuild a ``ByteLevel`` from ``add_prefix_space`` there.
_BYTE_LEVEL = ("RobertaTokenizer", "GPT2Tokenizer", "DebertaTokenizer", "LukeTokenizer",
               "Qwen2Tokenizer", "BartTokenizer", "LEDTokenizer", "LongformerTokenizer",
               "MvpTokenizer")  # fmt: skip
#: Classes that, from transformers 5 on, build normaliser and pre-tokenizer again and take nothing
#: but the table of characters from ``tokenizer.json``. transformers 4 took the file as it is, and
#: some of its files differ: blanks in a row and at the ends of a text were tokens of their own.
_SENTENCEPIECE = ("XLMRobertaTokenizer", "CamembertTokenizer", "T5Tokenizer", "AlbertTokenizer",
                  "DebertaV2Tokenizer")  # fmt: skip
#: The unknown token of these, whatever the file says.
_UNKNOWN = MappingProxyType({"XLMRobertaTokenizer": 3, "T5Tokenizer": 2, "AlbertTokenizer": 1})
#: The normaliser of other classes, whatever the file says.
_NORMALIZERS = MappingProxyType(
    {"Qwen2Tokenizer": {"type": "NFC"},
     "GemmaTokenizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}
)  # fmt: skip
_BRACKETS = (("cls_token", "[CLS]"), ("sep_token", "[SEP]"))
_ANGLES = (("cls_token", "<s>"), ("sep_token", "</s>"))
_ENDS = (("bos_token", "<s>"), ("eos_token", "</s>"))
#: The tokens around a text by these classes, whatever the file says: settings and their defaults.
_AROUND = MappingProxyType(
    {**dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"), _BRACKETS),
     **dict.fromkeys(("RobertaTokenizer", "MPNetTokenizer"), _ANGLES),
     **dict.fromkeys(("XLMRobertaTokenizer", "CamembertTokenizer"), _ENDS),
     "T5Tokenizer": _ENDS[1:]}
)  # fmt: skip
#: Settings that name several tokens, beside those that end in "_token".
_NAMED = ("additional_special_tokens", "extra_special_tokens", "added_tokens.json")
#: Classes that take ``tokenizer.json`` as it is.
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")
#: Classes by ``model_type``, where no file names one.
_BY_ARCHITECTURE = MappingProxyType(
    {**dict.fromkeys(("bert", "distilbert", "electra", "nomic_bert"), "BertTokenizer"),
     **dict.fromkeys(("xlm-roberta", "gte"), "XLMRobertaTokenizer"),
     "albert": "AlbertTokenizer", "camembert": "CamembertTokenizer", "mpnet": "MPNetTokenizer",
     "deberta-v2": "DebertaV2Tokenizer", "gemma3_text": "GemmaTokenizer",
     "qwen3": "Qwen2Tokenizer", "roberta": "RobertaTokenizer", "t5": "T5Tokenizer"}
)  # fmt: skip


def tokenizer_class(tokenizer: Settings, config: Settings) -> str:
    """The class that transformers takes, without ``Fast``; empty where that is a general one."""
    if config.get("model_type") in ("modernbert", "mistral"):
        return ""  # whatever the files name
    named = tokenizer.text("tokenizer_class", None) or config.text("tokenizer_class", None)
    default = _BY_ARCHITECTURE.get(str(config.get("model_type")), "")
    return (named or default).removesuffix("Fast")


def tokenizer_content(description: Description) -> dict[str, Any]:
    """The tokenizer that transformers would use, as the content of a ``tokenizer.json``."""
    directory = description.transformer_path
    config = _token_settings(directory)
    path = directory / "tokenizer.json"
    if description.architecture != STATIC and not is_there(path):
        content = _converted_by_transformers(directory)
    else:
        content = dict(read_json(path, JSON_LIMIT))
    with own_errors(DamagedEncoderError, f"{path} cannot be read"):
        if description.architecture == STATIC:
            _fit_static(content, description, path)
        elif is_there(path):
            name = tokenizer_class(config, description.config)
            content = _as_configured(content, name, config, path)
        require_bounded(content)
        _fit_vocabulary(content, description, path)
    content["truncation"] = content["padding"] = None
    if description.do_lower_case:
        content["normalizer"] = _with_lower_case(content.get("normalizer"))
    _try_expressions(content, path)
    return content


def is_model2vec(root: Path) -> bool:
    """Whether the directory of a static model means what model2vec makes of it."""
    return not (root / "modules.json").is_file()


def _fit_static(content: dict[str, Any], description: Description, path: Path) -> None:
    """Make it that of a static model: without special tokens, and with what model2vec does."""
    from tokenizers import Tokenizer

    content["post_processor"] = None
    vocabulary = Tokenizer.from_str(json.dumps(content)).get_vocab()
    count = description.config.integer("vocab_size")
    if max(vocabulary.values(), default=0) >= count:
        raise DamagedEncoderError(
            f"{description.weights[0]} has vectors for {count} tokens; {path} has more."
        )
    if not is_model2vec(description.path):
        return
    limit, model = description.max_seq_length, content["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")
    characters = int(np.median([len(token) for token in vocabulary]))
    content[MODEL2VEC] = {
        "characters": None if limit is None else limit * characters,
        "dropped": vocabulary.get(unknown) if isinstance(unknown, str) else unknown,
    }


def _fit_vocabulary(content: dict[str, Any], description: Description, path: Path) -> None:
    """Refuse a tokenizer that knows no words, or words that the model has no vectors for.

    transformers makes one without words where the files that list them are missing.
    """
    words, added = content["model"]["vocab"], content.get("added_tokens") or ()
    ids = (
        dict(words) if isinstance(words, dict) else {word: at for at, (word, _) in enumerate(words)}
    )
    if not ids.keys() - {token["content"] for token in added}:
        raise DamagedEncoderError(
            f"{path.parent} has no vocabulary: {path.name} or the files that it is made from "
            "(vocab.txt, a sentencepiece model...) are missing or empty. Copy them too."
        )
    rows = description.config.get("vocab_size")
    if description.architecture == STATIC or not isinstance(rows, int):
        return
    last = max([*ids.values(), *_ids_around(content)])
    _leave_out_beyond(content, rows)
    if last >= rows:
        raise DamagedEncoderError(
            f"{path} has a token with the id {last}, and the model has vectors for {rows} tokens, "
            "0 to the last; the tokenizer is of another model."
        )


def _ids_around(content: Mapping[str, Any]) -> list[int]:
    """Ids of the added tokens that are put around a text."""
    template = json.dumps(content.get("post_processor"))
    added = content.get("added_tokens") or ()
    return [token["id"] for token in added if json.dumps(token["content"]) in template]


def _leave_out_beyond(content: dict[str, Any], rows: int) -> None:
    """Leave out added tokens behind the model's last vector.

    transformers adds special tokens there that a class has and a vocabulary lacks (``[MASK]``). A
    text that has one ends there as an ``IndexError``; here it is read as words.
    """
    if added := content.get("added_tokens"):
        content["added_tokens"] = [token for token in added if token["id"] < rows]


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
    content: dict[str, Any], name: str, config: Settings, path: Path
) -> dict[str, Any]:
    _require_same_tokens(content, name, config, path)
    normalizer = content.get("normalizer") or {}
    if normalizer != _NORMALIZERS.get(name, normalizer):
        raise UnsupportedEncoderError(
            f"{path}: {name} has another normaliser in transformers, {_NORMALIZERS[name]}."
        )
    if normalizer.get("type") == "BertNormalizer" and name in _BERT_LIKE:
        changes = {
            key: config.get(setting, _BERT_DEFAULTS[setting]) for setting, key in _BERT_KEYS.items()
        }
        content["normalizer"] = {**normalizer, **changes}
    if name in _SENTENCEPIECE and content["model"]["type"] == "Unigram":
        return {**content, **_rebuilt(content, name, config)}
    for part in parts_of(content.get("pre_tokenizer")):
        _follow_prefix(part, name, config.get("add_prefix_space"), path)
    return content


def _rebuilt(content: Mapping[str, Any], name: str, config: Settings) -> dict[str, Any]:
    """The parts that the classes of ``_SENTENCEPIECE`` build."""
    if name == "DebertaV2Tokenizer":
        return _deberta(config)
    before = _albert(config) if name == "AlbertTokenizer" else []
    prefix = name == "T5Tokenizer" or config.get("add_prefix_space")
    unknown = _UNKNOWN.get(name, content["model"].get("unk_id"))
    rebuilt = _sentencepiece(content.get("normalizer") or {}, before, prefix)
    return {**rebuilt, "model": {**content["model"], "unk_id": unknown}}


def _require_same_tokens(
    content: Mapping[str, Any], name: str, config: Settings, path: Path
) -> None:
    """Refuse tokens of ``tokenizer_config.json`` that are others in the file.

    transformers adds them: a text is divided where one stands, and some classes put them around it.

    Raises:
        UnsupportedEncoderError: there are some.
    """
    config.only("split_special_tokens", [False], False)
    wrong = _other_tokens(content.get("added_tokens") or (), config)
    around = [_contents(config.get(key) or default)[0] for key, default in _AROUND.get(name, ())]
    if around and around != _around(content):
        wrong.update(around)
    if wrong:
        raise UnsupportedEncoderError(
            f"{path.with_name('tokenizer_config.json')} names the tokens "
            f"{', '.join(sorted(wrong))[:200]}, which {path.name} does not have, or otherwise. "
            "Make them agree."
        )


def _other_tokens(added: Collection[Mapping[str, Any]], config: Settings) -> set[str]:
    """Tokens that settings name and that are not ``added``, or are with other flags."""
    known = {token["content"]: _flags(token) for token in added}
    named = [config[key] for key in config if key in _NAMED or key.endswith("_token")]
    listed = config.object("added_tokens_decoder").values()
    other = {each["content"] for each in listed if known.get(each["content"]) != _flags(each)}
    return other.union(*map(_contents, named)) - (known.keys() - other)


def _flags(token: Mapping[str, Any]) -> list[bool]:
    """How a text is divided at an added token."""
    return [bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")]


def _token_settings(directory: Path) -> Settings:
    """``tokenizer_config.json``, with the older files that are read where it lists no tokens."""
    config = read_if_there(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    older = read_if_there(directory / "special_tokens_map.json")
    added = {"added_tokens.json": list(read_if_there(directory / "added_tokens.json"))}
    return Settings({**config, **older, **added}, config.path)


def _contents(value: Any) -> list[str]:
    """The tokens that a setting names: one, as text or with its flags, several, or none."""
    if isinstance(value, dict):
        value = value["content"] if "content" in value else list(value.values())
    values = value if isinstance(value, list) else [value]
    return [
        v["content"] if isinstance(v, dict) else v for v in values if isinstance(v, (dict, str))
    ]


def _around(content: Mapping[str, Any]) -> list[str]:
    """The tokens that the file puts around a text."""
    from tokenizers import Tokenizer

    empty = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
             "post_processor": content.get("post_processor")}  # fmt: skip
    return list(Tokenizer.from_str(json.dumps(empty)).encode("").tokens)


def _albert(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``AlbertTokenizer`` does before anything else."""
    quotes: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": quote}, "content": '"'} for quote in ("``", "''")
    ]
    plain = [] if config.get("keep_accents", False) else ["NFKD", "StripAccents"]
    plain += ["Lowercase"] if config.get("do_lower_case", True) else []
    return [*quotes, *({"type": kind} for kind in plain)]


def _deberta(config: Mapping[str, Any]) -> dict[str, Any]:
    """Normaliser and pre-tokenizer of ``DebertaV2Tokenizer``."""
    lower = [{"type": "Lowercase"}] if config.get("do_lower_case", False) else []
    blanks = {"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": " "}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    scheme = "always" if config.get("add_prefix_space", True) else "first"
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme,
                 "split": True}  # fmt: skip
    split = config.get("split_by_punct", False)
    punctuation = [{"type": "Punctuation", "behavior": "Isolated"}] if split else []
    parts = [*lower, blanks, {"type": "NFC"}, strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": parts},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*punctuation, metaspace]},
    }


def _sentencepiece(
    normalizer: Mapping[str, Any], before: Sequence[Mapping[str, Any]], prefix: Any
) -> dict[str, Any]:
    """Normaliser and pre-tokenizer as the classes of ``_SENTENCEPIECE`` build them."""
    parts = normalizer.get("normalizers", [normalizer])
    characters = [*before, *(part for part in parts if part.get("type") == "Precompiled")]
    scheme = "always" if prefix is None or prefix else "never"
    metaspace = {"replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    split = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **metaspace}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": characters} if characters else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
    }


def _follow_prefix(part: dict[str, Any], name: str, prefix: Any, path: Path) -> None:
    """Whether a blank is put before a text: by the class, where it builds this part again."""
    kind = part["type"]
    if kind == "ByteLevel" and name in _BYTE_LEVEL:
        part["add_prefix_space"] = bool(prefix)
    elif kind in ("ByteLevel", "Metaspace") and prefix is not None and name not in _GENERIC:
        always = part.get("add_prefix_space", True)
        stored = always if kind == "ByteLevel" else part.get("prepend_scheme") != "never"
        if bool(prefix) != stored:
            raise UnsupportedEncoderError(
                f"{path.with_name('tokenizer_config.json')}: 'add_prefix_space' is {prefix!r}, "
                f"which {path.name} contradicts, and which of them {name} follows is not known. "
                "Make them agree."
            )


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
    normalizer = normalizer or {"normalizers": []}
    parts = normalizer.get("normalizers", [normalizer])
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
