-- Take a binding from one state to another (filling, active, replaced); for the owner of its table, or
-- a role that may write the column. Returns whether it was in the first.
CREATE FUNCTION sbert.set_state_v1(binding_id uuid, before text, after text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.require_writer_v1(set_state_v1.binding_id);
    UPDATE sbert.binding AS b SET state = set_state_v1.after
     WHERE b.id = set_state_v1.binding_id AND b.state = set_state_v1.before;
    RETURN FOUND;
END
$body$;
