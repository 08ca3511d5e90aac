"""What is stale: marks, claims on them, backfills, audits, and the status of columns."""
