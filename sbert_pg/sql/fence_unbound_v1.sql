-- The fence of a table that is not bound itself: a partition stands for its table; a table that has
-- been put in the place of a bound one by renaming is refused; any other is free.
CREATE FUNCTION sbert.fence_unbound_v1(relation regclass, column_name text, fingerprint text)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_root regclass := pg_partition_root(relation);
BEGIN
    IF v_root <> relation THEN
        RETURN sbert.fence_v1(v_root, column_name, fingerprint);
    END IF;
    PERFORM sbert.require_unswapped_v1(relation, column_name);
    RETURN true;
END
$body$;
