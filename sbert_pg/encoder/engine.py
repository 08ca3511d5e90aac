"""Tokenizer and sessions of one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.providers import Provider
from sbert_pg.encoder.tokenizing import TextTokenizer


class Engine:
    """What has to be made anew after a fork.

    Args:
        directory: the converted directory.
        manifest: its manifest.
        threads: threads of inference; as many as the process may use by default.
        providers: see ``Encoder.load``.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        threads: int | None,
        providers: Sequence[Provider] | None,
    ) -> None:
        # onnxruntime takes a fifth of a second to import, and not every process encodes.
        from sbert_pg.encoder.runner import Runner

        self.pid = os.getpid()
        content = (directory / converted.TOKENIZER).read_text(encoding="utf-8")
        self.tokenizer = TextTokenizer(
            content, manifest.spec.max_seq_length, manifest.truncation_side
        )
        self.runner = Runner(
            directory / converted.MODEL, manifest.inputs, threads=threads, providers=providers
        )
