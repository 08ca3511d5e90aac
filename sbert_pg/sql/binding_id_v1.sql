-- Identity of the binding of a column, NULL where it has none. A partition's is its table's, or its own
-- where that has none.
CREATE FUNCTION sbert.binding_id_v1(relation regclass, column_name text)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    -- Not in the language sql, which before PostgreSQL 18 plans its query at each call.
    RETURN coalesce(
        (SELECT b.id FROM sbert.binding b
          WHERE b.relation = coalesce(pg_partition_root($1), $1) AND b.column_name = $2),
        (SELECT b.id FROM sbert.binding b WHERE b.relation = $1 AND b.column_name = $2));
END
$body$;
