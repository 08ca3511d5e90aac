-- Forget bindings whose table has been dropped; returns how many.
CREATE FUNCTION sbert.prune_v1()
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_count integer;
BEGIN
    UPDATE sbert.binding AS b SET replaces_id = NULL
     WHERE EXISTS (SELECT FROM sbert.binding o WHERE o.id = b.replaces_id
                    AND NOT EXISTS (SELECT FROM pg_class k WHERE k.oid = o.relation));
    DELETE FROM sbert.binding AS b
     WHERE NOT EXISTS (SELECT FROM pg_class k WHERE k.oid = b.relation);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END
$body$;
