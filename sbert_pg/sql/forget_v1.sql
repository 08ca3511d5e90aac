-- Remove what the catalog knows of a binding; for the owner of its table, or whoever finds the table
-- gone. A binding ends through sbert.unbind_v1.
CREATE FUNCTION sbert.forget_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.require_owner_v1(b.relation) FROM sbert.binding b WHERE b.id = forget_v1.binding_id;
    UPDATE sbert.binding AS b SET replaces_id = NULL WHERE b.replaces_id = forget_v1.binding_id;
    DELETE FROM sbert.binding AS b WHERE b.id = forget_v1.binding_id;
    DELETE FROM sbert.encoder AS e
     WHERE NOT EXISTS (SELECT FROM sbert.binding b WHERE b.encoder_id = e.id);
END
$body$;
