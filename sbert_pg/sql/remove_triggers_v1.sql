-- Take the triggers and trigger functions of one binding away; those that are gone already are
-- passed over, also where the table itself is gone.
CREATE FUNCTION sbert.remove_triggers_v1(p_column_id integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_row record;
BEGIN
    FOR v_row IN
        SELECT t.tgname, format('%I.%I', n.nspname, k.relname) AS relation
          FROM pg_trigger t
          JOIN pg_class k ON k.oid = t.tgrelid
          JOIN pg_namespace n ON n.oid = k.relnamespace
          JOIN sbert.embedding_column c ON c.relation = t.tgrelid
         WHERE c.id = p_column_id AND NOT t.tgisinternal
           AND t.tgname IN ('sbert_' || p_column_id || '_insert', 'sbert_' || p_column_id || '_update',
                            'sbert_' || p_column_id || '_delete',
                            'sbert_' || p_column_id || '_truncate')
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_row.tgname, v_row.relation);
    END LOOP;
    EXECUTE format('DROP FUNCTION IF EXISTS sbert.%I()', 'inserted_' || p_column_id);
    EXECUTE format('DROP FUNCTION IF EXISTS sbert.%I()', 'updated_' || p_column_id);
    EXECUTE format('DROP FUNCTION IF EXISTS sbert.%I()', 'deleted_' || p_column_id);
    EXECUTE format('DROP FUNCTION IF EXISTS sbert.%I()', 'truncated_' || p_column_id);
END
$body$;
