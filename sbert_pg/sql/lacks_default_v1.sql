-- Whether a companion of a table, or of one of its partitions, does not default to the nil uuid, which
-- says that a row is new: with NULL it would be one of a backfill.
CREATE FUNCTION sbert.lacks_default_v1(relation regclass, companion text)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $body$
    SELECT EXISTS (
        SELECT FROM (SELECT $1::oid UNION SELECT t.relid FROM pg_partition_tree($1) t) AS r (relid)
          JOIN pg_attribute a ON a.attrelid = r.relid AND a.attname = $2 AND NOT a.attisdropped
          LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
         WHERE pg_get_expr(d.adbin, d.adrelid)
               IS DISTINCT FROM '''00000000-0000-0000-0000-000000000000''::uuid')
$body$;
