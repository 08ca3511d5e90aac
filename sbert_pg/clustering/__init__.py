"""Clusters as tables of the application, and near-duplicates."""

from sbert_pg.clustering.algorithms import HDBSCAN, Agglomerative, Communities, KMeans
from sbert_pg.clustering.assigning import Assigned, Drift, assign, drift
from sbert_pg.clustering.declaration import Clustering, clusters_of
from sbert_pg.clustering.labels import find_keywords, name_cluster
from sbert_pg.clustering.run import cluster
from sbert_pg.clustering.states import fail_lost_runs, make_current, prune
from sbert_pg.clustering.tables import Assignment, Cluster, ClusterRun

__all__ = [
    "HDBSCAN",
    "Agglomerative",
    "Assigned",
    "Assignment",
    "Cluster",
    "ClusterRun",
    "Clustering",
    "Communities",
    "Drift",
    "KMeans",
    "assign",
    "cluster",
    "clusters_of",
    "drift",
    "fail_lost_runs",
    "find_keywords",
    "make_current",
    "name_cluster",
    "prune",
]
