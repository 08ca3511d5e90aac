-- Remove a binding by its number, whether or not its table still exists.
CREATE FUNCTION sbert.forget_v1(p_column_id integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.remove_triggers_v1(p_column_id);
    PERFORM set_config('sbert.maintenance', 'on', true);
    UPDATE sbert.embedding_column SET replaces_id = NULL WHERE replaces_id = p_column_id;
    DELETE FROM sbert.embedding_column WHERE id = p_column_id;
    PERFORM set_config('sbert.maintenance', 'off', true);
    -- Last, so that a writer who is still at work cannot leave a mark behind: dropping the triggers
    -- has waited for it.
    DELETE FROM sbert.pending WHERE column_id = p_column_id;
END
$body$;
