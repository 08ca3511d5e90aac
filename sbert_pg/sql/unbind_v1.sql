-- Undo bind_v1: the triggers, the two indexes, and all that the catalog knows of the column. The
-- column, its companion and its vectors stay. Returns whether it was bound.
CREATE FUNCTION sbert.unbind_v1(relation regclass, column_name text)
RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id uuid;
    v_row record;
BEGIN
    -- First: somebody else's binding may be hidden from the caller, which must not read as "not bound".
    PERFORM sbert.require_owner_v1(unbind_v1.relation);
    SELECT b.id INTO v_id FROM sbert.binding b
     WHERE b.relation = unbind_v1.relation AND b.column_name = unbind_v1.column_name;
    IF v_id IS NULL THEN
        RETURN false;
    END IF;
    FOR v_row IN SELECT t.name FROM sbert.triggers_v1(v_id) t LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_row.name, sbert.name_v1(unbind_v1.relation));
    END LOOP;
    FOR v_row IN SELECT * FROM sbert.queue_ddl_v1(v_id) d WHERE d.existing IS NOT NULL LOOP
        EXECUTE format('DROP INDEX %s', v_row.existing);
    END LOOP;
    PERFORM sbert.forget_v1(v_id);
    RETURN true;
END
$body$;
