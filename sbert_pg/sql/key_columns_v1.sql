-- The columns that name a row: the primary key, else the narrowest unique index over NOT NULL
-- columns; NULL where there is neither, or where a type is not fit for naming a row for ever.
CREATE FUNCTION sbert.key_columns_v1(p_relation regclass)
RETURNS text[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT keys.names
      FROM (
        SELECT array_agg(a.attname::text ORDER BY k.position) AS names,
               i.indisprimary, i.indnkeyatts, i.indexrelid,
               bool_and(a.attnotnull AND NOT (
                   base.typtype = 'c' OR base.typcategory = 'A'
                   OR base.oid IN ('float4'::regtype, 'float8'::regtype, 'money'::regtype)
               )) AS usable
          FROM pg_index i
         CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          JOIN pg_type base ON base.oid = sbert.base_type_v1(a.atttypid)
         WHERE i.indrelid = p_relation AND i.indisunique AND i.indisvalid AND i.indimmediate
           AND i.indpred IS NULL AND i.indexprs IS NULL AND k.position <= i.indnkeyatts
         GROUP BY i.indexrelid, i.indisprimary, i.indnkeyatts
      ) AS keys
     WHERE keys.usable
     ORDER BY keys.indisprimary DESC, keys.indnkeyatts, keys.indexrelid
     LIMIT 1
$body$;
