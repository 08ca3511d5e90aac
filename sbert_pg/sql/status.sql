-- One row per bound column of a table that the caller may read. Rows and vectors are estimates from
-- the planner's statistics, so the view costs the same on a large table as on a small one. What is
-- pending only the table can say: sbert-pg status counts it.
CREATE VIEW sbert.status AS
SELECT b.id,
       n.nspname::text AS schema_name,
       k.relname::text AS table_name,
       b.column_name,
       b.companion,
       b.encoder_name,
       e.fingerprint,
       b.dimensions,
       b.state,
       stats.rows AS estimated_rows,
       stats.embedded AS estimated_embedded,
       b.caught_up_at,
       failures.retrying,
       health.problems,
       cardinality(health.problems) = 0 AS noticing,
       b.last_audit,
       indexes.ready AS index_ready,
       indexes.names AS index_names
  FROM sbert.binding b
  JOIN pg_catalog.pg_class k ON k.oid = b.relation
  JOIN pg_catalog.pg_namespace n ON n.oid = k.relnamespace
  LEFT JOIN sbert.encoder e ON e.id = b.encoder_id
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
        ON s.schemaname = pn.nspname AND s.tablename = p.relname AND s.attname = b.column_name
       AND NOT s.inherited
  ) AS stats
 CROSS JOIN LATERAL (
    SELECT ARRAY(SELECT h FROM sbert.health_v1(b.id) AS h) AS problems
  ) AS health
 CROSS JOIN LATERAL (
    SELECT count(*) AS retrying FROM sbert.failure f WHERE f.binding_id = b.id AND NOT f.skipped
  ) AS failures
 CROSS JOIN LATERAL (
    SELECT bool_and(i.indisvalid AND i.indisready) AS ready,
           array_agg(ik.relname::text ORDER BY ik.relname) AS names
      FROM pg_catalog.pg_index i
      JOIN pg_catalog.pg_class ik ON ik.oid = i.indexrelid
      JOIN pg_catalog.pg_am am ON am.oid = ik.relam
     WHERE i.indrelid = b.relation AND am.amname IN ('hnsw', 'ivfflat')
       AND EXISTS (
            SELECT FROM pg_catalog.pg_depend d
              JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.indexrelid
               AND d.refobjid = b.relation AND a.attname = b.column_name
       )
  ) AS indexes
 WHERE pg_catalog.has_any_column_privilege(b.relation, 'SELECT')
