-- A column that has replaced another, or gives up doing so, stands by itself; for the owner of its
-- table.
CREATE FUNCTION sbert.end_replacement_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.require_owner_v1(b.relation) FROM sbert.binding b
     WHERE b.id = end_replacement_v1.binding_id;
    UPDATE sbert.binding AS b SET replaces_id = NULL WHERE b.id = end_replacement_v1.binding_id;
END
$body$;
