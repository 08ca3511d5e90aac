-- Identity of the binding of a column, a partition's being its table's; NULL where it has none.
CREATE FUNCTION sbert.binding_id_v1(relation regclass, column_name text)
RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT b.id FROM sbert.binding b
     WHERE b.relation = coalesce(pg_partition_root($1), $1) AND b.column_name = $2
$body$;
