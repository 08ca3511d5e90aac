"""Clusters as tables of the application, and near-duplicates."""

from sbert_pg.clustering.algorithms import HDBSCAN, Agglomerative, Communities, KMeans
from sbert_pg.clustering.assigning import Assigned, ClusterKeeper, Drift, assign, drift
from sbert_pg.clustering.declaration import Clustering, clusters_of, declared_clusterings
from sbert_pg.clustering.duplicates import (
    Duplicate,
    DuplicateReport,
    DuplicateTable,
    Pair,
    duplicate_pairs,
    duplicates_of,
    find_duplicates,
    groups_of,
    index_recall,
)
from sbert_pg.clustering.keywords import find_keywords, name_cluster
from sbert_pg.clustering.mapping import ClusterMap, cluster_map, mapped_rows, store_map
from sbert_pg.clustering.runs import cluster, fail_lost_runs, make_current, prune
from sbert_pg.clustering.summary import Flow, flows, run_before
from sbert_pg.clustering.tables import Assignment, Cluster, ClusterRun
from sbert_pg.clustering.views import ClusterViews, create_views, drop_views

__all__ = [
    "HDBSCAN",
    "Agglomerative",
    "Assigned",
    "Assignment",
    "Cluster",
    "ClusterKeeper",
    "ClusterMap",
    "ClusterRun",
    "ClusterViews",
    "Clustering",
    "Communities",
    "Drift",
    "Duplicate",
    "DuplicateReport",
    "DuplicateTable",
    "Flow",
    "KMeans",
    "Pair",
    "assign",
    "cluster",
    "cluster_map",
    "clusters_of",
    "create_views",
    "declared_clusterings",
    "drift",
    "drop_views",
    "duplicate_pairs",
    "duplicates_of",
    "fail_lost_runs",
    "find_duplicates",
    "find_keywords",
    "flows",
    "groups_of",
    "index_recall",
    "make_current",
    "mapped_rows",
    "name_cluster",
    "prune",
    "run_before",
    "store_map",
]
