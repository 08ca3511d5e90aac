-- Undo bind_v1: the triggers, the marks, and all that the catalog knows of the column. The column
-- and its vectors stay. Returns whether it was bound.
CREATE FUNCTION sbert.unbind_v1(relation regclass, column_name text)
RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id integer;
BEGIN
    SELECT c.id INTO v_id FROM sbert.embedding_column c
     WHERE c.relation = unbind_v1.relation AND c.column_name = unbind_v1.column_name;
    IF v_id IS NULL THEN
        RETURN false;
    END IF;
    PERFORM sbert.forget_v1(v_id);
    RETURN true;
END
$body$;
