"""Which encoders share a vector space: every case that the specs and the probes have to decide."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import WORDS, write_tiny

from sbert_pg.encoder import Encoder, conversion
from sbert_pg.errors import ConversionError, EncoderMismatchError
from sbert_pg.probes import (
    EXPORT_MIN_COSINE,
    PRECISION_MEAN_COSINE,
    PRECISION_MIN_COSINE,
    PROBES,
    agreement_of,
    compatible,
    compatible_specs,
)
from sbert_pg.spec import EncoderSpec, same_encoder_name

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(fp32: Encoder) -> Encoder:
    return fp32


@pytest.fixture
def changed(minilm_path: Path, tmp_path: Path) -> Callable[[Change], Encoder]:
    """The real model with something changed in its files."""

    def make(change: Change) -> Encoder:
        path = tmp_path / "changed"
        shutil.copytree(minilm_path, path)
        change(path)
        return Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Change], Encoder]:
    """A model of a few milliseconds, with a Dense layer, with something changed in its files."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(change: Change) -> Encoder:
        path = folder / change.__name__
        if not path.exists():
            change(write_tiny(path))
        return Encoder.load(path, precision="fp32", cache_dir=folder / "cache")

    return make


def unchanged(path: Path) -> None:
    pass


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def anonymous(spec: EncoderSpec) -> EncoderSpec:
    """A spec of which only what an application declares is known."""
    return EncoderSpec(name=spec.name, dimensions=spec.dimensions, similarity=spec.similarity)


def test_itself(base: Encoder) -> None:
    verdict = compatible(base, Encoder.open(base.directory, threads=1))
    assert verdict
    assert "equal" in verdict.reason


def test_int8_and_fp32(base: Encoder, int8: Encoder) -> None:
    assert int8.spec.fingerprint != base.spec.fingerprint
    verdict = compatible(base, int8)
    assert verdict, verdict.reason
    assert verdict.agreement is not None
    # Room on both sides: what int8 reaches, and what the thresholds ask for.
    assert verdict.agreement.min_cosine > PRECISION_MIN_COSINE + 0.01
    assert verdict.agreement.mean_cosine > PRECISION_MEAN_COSINE + 0.005


@pytest.mark.slow
def test_another_exporter(
    base: Encoder, minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torch", "sentence_transformers", "onnxscript"):
        pytest.importorskip(package, reason="the other exporter is torch's")
    from sbert_pg.encoder import graph

    monkeypatch.setattr(graph, "ARCHITECTURES", ())
    other = Encoder.load(minilm_path, precision="fp32", cache_dir=tmp_path)
    assert other.manifest.exporter == "torch"
    # It computes the same, so it is the same encoder by its fingerprint already.
    assert compatible(base, other)
    agreement = agreement_of(base.probe_vectors, other.probe_vectors)
    assert agreement.min_cosine > 0.999999
    # And it is recognised by its probes where the digests are not known.
    unknown = replace(other.spec, weights_digest=None, tokenizer_digest=None)
    verdict = compatible_specs(base.spec, base.probe_vectors, unknown, other.probe_vectors)
    assert verdict, verdict.reason


def test_another_batch_shape_and_thread_count(base: Encoder) -> None:
    other = Encoder.open(base.directory, threads=2)
    alone = np.stack([other.encode(text, prompt="") for text in PROBES])
    agreement = agreement_of(alone, base.probe_vectors)
    assert agreement.min_cosine > EXPORT_MIN_COSINE


def pooling(path: Path) -> None:
    edit(
        path / "1_Pooling" / "config.json",
        pooling_mode_cls_token=True,
        pooling_mode_mean_tokens=False,
    )


def no_normalisation(path: Path) -> None:
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps(modules[:-1]))


def document_prompt(path: Path) -> None:
    edit(path / "config_sentence_transformers.json", prompts={"document": "passage: "})


def fewer_layers(path: Path) -> None:
    edit(path / "config.json", num_hidden_layers=3)


def another_activation(path: Path) -> None:
    edit(path / "config.json", hidden_act="relu")


def other_heads(path: Path) -> None:
    edit(path / "config.json", num_attention_heads=6)


def another_epsilon(path: Path) -> None:
    edit(path / "config.json", layer_norm_eps=0.5)


def truncated_at_the_left(path: Path) -> None:
    edit(path / "tokenizer_config.json", truncation_side="left")


def shorter(path: Path) -> None:
    edit(path / "sentence_bert_config.json", max_seq_length=128)


def cased(path: Path) -> None:
    edit(path / "tokenizer_config.json", do_lower_case=False, tokenizer_class="BertTokenizer")


def similarity(path: Path) -> None:
    edit(path / "config_sentence_transformers.json", similarity_fn_name="euclidean")


def fine_tuned(path: Path) -> None:
    """As little as a short fine-tuning changes: one percent of each weight matrix."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layer" in name:
            noise = random.standard_normal(tensor.shape).astype(np.float32)
            tensors[name] = tensor + 0.02 * tensor.std() * noise
    file.unlink()
    save_file(tensors, file)


#: The change, what the message says, and whether the probes alone see it. The weights of the
#: changed configurations are equal to the byte.
CASES: list[tuple[Change, str, bool]] = [
    (pooling, "pooling", True),
    (no_normalisation, "normalisation", True),
    (document_prompt, "prompts for documents", True),
    (fewer_layers, "not known to be the same", True),
    (another_activation, "not known to be the same", True),
    (other_heads, "not known to be the same", True),
    (another_epsilon, "not known to be the same", True),
    (truncated_at_the_left, "another tokenizer", True),
    (shorter, "max_seq_length", True),
    (cased, "another tokenizer", True),
    (similarity, "similarity function", True),
    (fine_tuned, "not known to be the same", True),
]


@pytest.mark.parametrize(
    ("change", "reason", "seen"), CASES, ids=[change.__name__ for change, _, _ in CASES]
)
def test_told_apart(
    base: Encoder,
    changed: Callable[[Change], Encoder],
    change: Change,
    reason: str,
    seen: bool,
) -> None:
    other = changed(change)
    assert other.spec.fingerprint != base.spec.fingerprint
    assert other.spec.document_fingerprint != base.spec.document_fingerprint
    verdict = compatible(base, other)
    assert not verdict
    assert reason in verdict.reason
    assert not compatible(other, base)
    # The probes alone, as where nothing but their vectors is known of the other side.
    alone = compatible_specs(
        anonymous(base.spec), base.probe_vectors, anonymous(other.spec), other.probe_vectors
    )
    assert bool(alone) is not seen, alone.reason


def test_another_prompt_for_queries_shares_the_vectors_of_documents(
    base: Encoder, changed: Callable[[Change], Encoder]
) -> None:
    other = changed(
        lambda path: edit(
            path / "config_sentence_transformers.json", prompts={"query": "query: ", "other": "x"}
        )
    )
    assert other.spec.fingerprint != base.spec.fingerprint
    assert other.spec.document_fingerprint == base.spec.document_fingerprint
    assert compatible(base, other)
    agreement = agreement_of(other.encode_query(["a"]), base.encode_query(["a"]))
    assert agreement.min_cosine < 0.99


@pytest.mark.parametrize(
    "values", [{"unknown_to_us": 1}, {"initializer_range": 0.5}, {"classifier_dropout": 0.3}]
)
def test_what_is_ignored_on_purpose_is_part_of_the_fingerprint(
    tiny: Callable[[Change], Encoder], values: dict[str, Any]
) -> None:
    """It does not change the vectors today; the probes, not we, say that they are the same."""

    def ignored(path: Path) -> None:
        edit(path / "config.json", **values)

    ignored.__name__ = "-".join(values)
    one, other = tiny(unchanged), tiny(ignored)
    assert other.spec.fingerprint != one.spec.fingerprint
    assert compatible(one, other)


def test_where_a_file_comes_from_is_no_part_of_it(tiny: Callable[[Change], Encoder]) -> None:
    def moved(path: Path) -> None:
        edit(path / "config.json", _name_or_path="elsewhere", transformers_version="9.9")
        for name in ("config.json", "tokenizer.json", "modules.json"):
            (path / name).write_text(json.dumps(json.loads((path / name).read_text()), indent=7))

    assert tiny(moved).spec.fingerprint == tiny(unchanged).spec.fingerprint


class PassedOn:
    """An application's encoder that passes on another one's spec and computes something else."""

    def __init__(self, inner: Encoder, sign: float = -1.0, probes: bool = True) -> None:
        self.inner, self.sign, self.probes = inner, sign, probes

    @property
    def spec(self) -> EncoderSpec:
        return self.inner.spec

    @property
    def probe_vectors(self) -> Any:
        return self.inner.probe_vectors if self.probes else self.encode_document(list(PROBES))

    def encode_query(self, texts: Sequence[str]) -> Any:
        return self.encode_document(texts)

    def encode_document(self, texts: Sequence[str]) -> Any:
        return np.roll(self.sign * self.inner.encode_document(texts), self.sign < 0, axis=1)


class Delegating(PassedOn):
    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Derived(Encoder):
    def encode_document(self, texts: Sequence[str]) -> Any:
        return -super().encode_document(texts)


@pytest.mark.parametrize("kind", [PassedOn, Delegating])
@pytest.mark.parametrize("probes", [True, False])
def test_a_passed_on_spec_is_not_believed(
    base: Encoder, kind: type[PassedOn], probes: bool
) -> None:
    verdict = compatible(base, kind(base, probes=probes))
    assert not verdict
    assert "fingerprints are equal" in verdict.reason
    assert compatible(base, kind(base, 1.0, probes)), "one that computes the same is accepted"


def test_a_derived_or_patched_encoder_is_measured(base: Encoder, monkeypatch: Any) -> None:
    assert not compatible(base, Derived.open(base.directory, threads=1))
    patched = Encoder.open(base.directory, threads=1)
    assert compatible(base, patched)
    monkeypatch.setattr(patched, "encode_document", lambda texts: -base.encode_document(texts))
    assert not compatible(base, patched)


def test_what_gives_no_vectors_for_the_probes_is_refused(base: Encoder) -> None:
    broken = PassedOn(base, float("nan"))
    with pytest.raises(EncoderMismatchError, match="not finite"):
        compatible(base, broken)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", True),
        ("ALL-minilm-l6-v2", "all-MiniLM-L6-v2", True),
        ("/models//v1/./encoder/", "/models/v1/encoder", True),
        ("/models/v1/encoder", "/models/v2/encoder", False),
        ("acme/base-v1", "other/base-v1", False),
        ("acme/base-v1", "base-v1", False),
        ("base-v1", "sentence-transformers/base-v1", False),
        ("/srv/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", False),
        ("./acme/base", "acme/base", False),
        ("/models/a/../b", "/models/b", False),
        ("/Models/x", "/models/x", False),
        ("/models/x", "models/x", False),
    ],
)
def test_names(a: str, b: str, same: bool) -> None:
    assert same_encoder_name(a, b) is same
    assert same_encoder_name(b, a) is same


def test_truncated_vectors(base: Encoder) -> None:
    short = Encoder.open(base.directory, dimensions=128)
    verdict = compatible(base, short)
    assert not verdict
    assert "384 dimensions against 128" in verdict.reason
    assert compatible(short, Encoder.open(base.directory, dimensions=128))


def test_below_its_floor_a_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = conversion.Floor(mean=1.1, worst=1.1)
    monkeypatch.setitem(conversion.FLOORS, "int8", floor)
    with pytest.raises(ConversionError, match=r"1\.1.*precision='fp32'"):
        Encoder.load(write_tiny(tmp_path / "tiny"), precision="int8", cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name == "model.onnx"]


def tokenizer(path: Path, part: str, **values: Any) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    edit(path / "tokenizer.json", **{part: {**content[part], **values}})


def no_normalizer(path: Path) -> None:
    edit(path / "tokenizer.json", normalizer=None)


def another_pre_tokenizer(path: Path) -> None:
    edit(path / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})


def an_added_token(path: Path) -> None:
    """One that no probe holds: the probes' vectors are equal to the last bit."""
    sides = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": WORDS.index("hello"), "content": "hello", **sides}
    edit(path / "tokenizer.json", added_tokens=[token])


def longest_word(path: Path) -> None:
    tokenizer(path, "model", max_input_chars_per_word=3)


def swapped_words(path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    vocabulary |= {"a": vocabulary["b"], "b": vocabulary["a"]}
    tokenizer(path, "model", vocab=vocabulary)


def no_last_token(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())["post_processor"]
    tokenizer(path, "post_processor", single=content["single"][:-1])
    edit(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def cut_at_the_left(path: Path) -> None:
    left = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(path / "tokenizer.json", truncation=left)


def blind_to_the_prompt(path: Path) -> None:
    edit(path / "1_Pooling" / "config.json", include_prompt=False)


def dense_activation(path: Path) -> None:
    name = "torch.nn.modules.linear.Identity"
    edit(path / "2_Dense" / "config.json", activation_function=name)


def dense_weight(path: Path) -> None:
    """The least that a float can change."""
    one_weight(path / "2_Dense" / "model.safetensors", "linear.weight")


def dense_after_normalize(path: Path) -> None:
    first, second, dense, normalize = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([first, second, normalize, dense]))


def lower_case_by_the_model(path: Path) -> None:
    edit(path / "sentence_bert_config.json", do_lower_case=True)


def one_weight(file: Path, name: str) -> None:
    tensors = load_file(file)
    changed = tensors[name].copy()
    changed.flat[0] = np.nextafter(changed.flat[0], np.float32(9))
    file.unlink()
    save_file({**tensors, name: changed}, file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_normalizer, "another tokenizer"),
        (another_pre_tokenizer, "another tokenizer"),
        (an_added_token, "another tokenizer"),
        (longest_word, "another tokenizer"),
        (swapped_words, "another tokenizer"),
        (no_last_token, "another tokenizer"),
        (cut_at_the_left, "another tokenizer"),
        (lower_case_by_the_model, "another tokenizer"),
        (blind_to_the_prompt, "include_prompt"),
        (dense_activation, "layers after pooling"),
        (dense_weight, "layers after pooling"),
        (dense_after_normalize, "layers after pooling"),
    ],
)
def test_told_apart_by_what_no_probe_may_see(
    tiny: Callable[[Change], Encoder], change: Change, reason: str
) -> None:
    """Whether or not the probes' vectors are near, or even equal."""
    one, other = tiny(unchanged), tiny(change)
    assert other.spec.fingerprint != one.spec.fingerprint
    assert other.spec.document_fingerprint != one.spec.document_fingerprint
    verdict = compatible(one, other)
    assert not verdict
    assert reason in verdict.reason


def unknown_to_dense(path: Path) -> None:
    edit(path / "2_Dense" / "config.json", unknown_to_us=1)


def unknown_to_normalize(path: Path) -> None:
    (path / "3").mkdir()
    (path / "3" / "config.json").write_text('{"p": 1}')


def unknown_to_pooling(path: Path) -> None:
    edit(path / "1_Pooling" / "config.json", unknown_to_us=1)


def one_weight_of_the_transformer(path: Path) -> None:
    one_weight(path / "model.safetensors", "encoder.layer.0.output.dense.weight")


def one_tensor_quantised(path: Path) -> None:
    file, name = path / "model.safetensors", "encoder.layer.0.output.dense.weight"
    tensors = load_file(file)
    step = np.abs(tensors[name]).max() / 127
    file.unlink()
    save_file({**tensors, name: (np.round(tensors[name] / step) * step).astype(np.float32)}, file)


@pytest.mark.parametrize(
    "change",
    [
        unknown_to_dense,
        unknown_to_normalize,
        unknown_to_pooling,
        one_weight_of_the_transformer,
        one_tensor_quantised,
    ],
)
def test_any_change_is_another_fingerprint_and_the_probes_decide(
    tiny: Callable[[Change], Encoder], change: Change
) -> None:
    one, other = tiny(unchanged), tiny(change)
    assert other.spec.fingerprint != one.spec.fingerprint
    verdict = compatible(one, other)
    assert verdict, verdict.reason
    assert "equal" not in verdict.reason


def test_names_of_modules_and_files_beside_the_model_do_not_count(
    tiny: Callable[[Change], Encoder],
) -> None:
    def renamed(path: Path) -> None:
        modules = json.loads((path / "modules.json").read_text())
        (path / "modules.json").write_text(json.dumps([{**m, "name": "x"} for m in modules]))
        (path / "README.md").write_text("hello")
        (path / "vocab.txt").write_text("\n".join(reversed(WORDS)))  # tokenizer.json counts

    assert tiny(renamed).spec.fingerprint == tiny(unchanged).spec.fingerprint
