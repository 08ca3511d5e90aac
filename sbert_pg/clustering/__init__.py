"""Clusters as tables, and near-duplicates."""
