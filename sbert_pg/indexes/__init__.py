"""Vector indexes: declare them, read them off a server, build them beside live traffic."""

from sbert_pg.indexes.build import build_index, index_builder
from sbert_pg.indexes.declare import (
    diskann_index,
    hnsw_index,
    index_like,
    index_name,
    indexes_per,
    ivfflat_index,
    vchordrq_index,
)
from sbert_pg.indexes.read import StoredIndex, index_state, same_index, vector_indexes

__all__ = [
    "StoredIndex",
    "build_index",
    "diskann_index",
    "hnsw_index",
    "index_builder",
    "index_like",
    "index_name",
    "index_state",
    "indexes_per",
    "ivfflat_index",
    "same_index",
    "vchordrq_index",
    "vector_indexes",
]
