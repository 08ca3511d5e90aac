-- One row per bound column. Rows and vectors are estimates from the planner's statistics, so the
-- view costs the same on a large table as on a small one; marks are counted up to 100,000.
CREATE VIEW sbert.status AS
SELECT c.id,
       n.nspname::text AS schema_name,
       k.relname::text AS table_name,
       c.column_name,
       c.encoder_name,
       e.fingerprint,
       c.dimensions,
       c.state,
       stats.rows AS estimated_rows,
       stats.embedded AS estimated_embedded,
       marks.pending,
       marks.pending >= 100000 AS pending_is_capped,
       oldest.marked_at AS oldest_pending,
       failures.failed,
       failures.skipped,
       triggers.noticing,
       c.last_audit,
       indexes.ready AS index_ready,
       indexes.names AS index_names
  FROM sbert.embedding_column c
  JOIN pg_catalog.pg_class k ON k.oid = c.relation
  JOIN pg_catalog.pg_namespace n ON n.oid = k.relnamespace
  LEFT JOIN sbert.encoder e ON e.id = c.encoder_id
 CROSS JOIN LATERAL (
    SELECT CASE WHEN bool_or(p.reltuples < 0) THEN NULL ELSE sum(p.reltuples)::bigint END AS rows,
           CASE WHEN bool_or(p.reltuples < 0 OR s.null_frac IS NULL) THEN NULL
                ELSE sum(p.reltuples * (1 - s.null_frac))::bigint END AS embedded
      FROM (
        SELECT k.oid AS oid WHERE k.relkind = 'r'
        UNION ALL
        SELECT t.relid FROM pg_catalog.pg_partition_tree(k.oid) t WHERE k.relkind = 'p' AND t.isleaf
      ) AS leaf
      JOIN pg_catalog.pg_class p ON p.oid = leaf.oid
      JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
      LEFT JOIN pg_catalog.pg_stats s
        ON s.schemaname = pn.nspname AND s.tablename = p.relname AND s.attname = c.column_name
       AND NOT s.inherited
  ) AS stats
 CROSS JOIN LATERAL (
    SELECT count(*) AS pending FROM (
        SELECT FROM sbert.pending m WHERE m.column_id = c.id AND NOT m.failed LIMIT 100000
    ) AS capped
  ) AS marks
 CROSS JOIN LATERAL (
    SELECT min(m.marked_at) AS marked_at FROM sbert.pending m
     WHERE m.column_id = c.id AND NOT m.failed
  ) AS oldest
 CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE NOT m.skipped) AS failed,
           count(*) FILTER (WHERE m.skipped) AS skipped
      FROM sbert.pending m WHERE m.column_id = c.id AND m.failed
  ) AS failures
 CROSS JOIN LATERAL (
    SELECT count(*) = 4 AS noticing
      FROM pg_catalog.pg_trigger t
     WHERE t.tgrelid = c.relation AND NOT t.tgisinternal AND t.tgenabled <> 'D'
       AND t.tgname LIKE 'sbert\_' || c.id || '\_%'
  ) AS triggers
 CROSS JOIN LATERAL (
    SELECT bool_and(i.indisvalid AND i.indisready) AS ready,
           array_agg(ik.relname::text ORDER BY ik.relname) AS names
      FROM pg_catalog.pg_index i
      JOIN pg_catalog.pg_class ik ON ik.oid = i.indexrelid
      JOIN pg_catalog.pg_am am ON am.oid = ik.relam
     WHERE i.indrelid = c.relation AND am.amname IN ('hnsw', 'ivfflat')
       AND EXISTS (
            SELECT FROM pg_catalog.pg_depend d
              JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.indexrelid
               AND d.refobjid = c.relation AND a.attname = c.column_name
       )
  ) AS indexes
