-- Identity of the binding of a column, NULL where it has none. A partition's is its table's, or its own
-- where that has none.
CREATE FUNCTION sbert.binding_id_v1(relation regclass, column_name text)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_root regclass := pg_partition_root($1);
    v_id uuid;
BEGIN
    -- Not in the language sql, which before PostgreSQL 18 plans its query at each call; and one plain
    -- look at a time, which costs less than both in one.
    IF v_root <> $1 THEN
        SELECT b.id INTO v_id FROM sbert.binding b WHERE b.relation = v_root AND b.column_name = $2;
    END IF;
    IF v_id IS NULL THEN
        SELECT b.id INTO v_id FROM sbert.binding b WHERE b.relation = $1 AND b.column_name = $2;
    END IF;
    RETURN v_id;
END
$body$;
