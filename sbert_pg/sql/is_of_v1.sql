-- Whether a table is a bound one, or a partition of it that no other binding of the same column,
-- higher up, has taken over; for triggers, which may have been put on any table.
CREATE FUNCTION sbert.is_of_v1(relation regclass, binding_id uuid)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT EXISTS (
        SELECT FROM sbert.binding b
         WHERE b.id = $2 AND (b.relation = $1
               OR b.relation::oid IN (SELECT relid FROM pg_partition_ancestors($1)))
           AND NOT EXISTS (SELECT FROM sbert.binding o
                            WHERE o.column_name = b.column_name AND o.relation <> b.relation
                              AND o.relation::oid IN (SELECT relid FROM pg_partition_ancestors(b.relation))))
$body$;
