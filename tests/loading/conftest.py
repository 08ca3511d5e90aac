"""The tables and the encoder that the tests of writing share."""

from __future__ import annotations

from write_fixtures import encoder, tables, write_template

__all__ = ["encoder", "tables", "write_template"]
