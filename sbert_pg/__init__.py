"""Embeddings in Postgres as naturally as any other column."""
