-- Trigger on sbert.embedding_column: a column that replaces another has its table watched for
-- writers of the old one, from the binding on until either of the two is unbound.
CREATE FUNCTION sbert.watch_writers_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_id integer := CASE WHEN TG_OP = 'DELETE' THEN OLD.id ELSE NEW.id END;
    v_relation oid := CASE WHEN TG_OP = 'DELETE' THEN OLD.relation ELSE NEW.relation END;
    v_old sbert.embedding_column;
    v_table text;
    v_changed text;
    v_written text;
    v_trigger text;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.replaces_id IS NOT DISTINCT FROM OLD.replaces_id THEN
        RETURN NULL;
    END IF;
    SELECT format('%I.%I', n.nspname, k.relname) INTO v_table
      FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace WHERE k.oid = v_relation;
    IF v_table IS NULL THEN
        RETURN NULL;
    END IF;
    FOR v_trigger IN
        SELECT t.tgname FROM pg_trigger t
         WHERE t.tgrelid = v_relation AND NOT t.tgisinternal
           AND t.tgname IN ('sbert_' || v_id || '_writer_update',
                            'sbert_' || v_id || '_writer_insert')
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_trigger, v_table);
    END LOOP;
    DELETE FROM sbert.old_writer WHERE column_id = v_id;
    IF TG_OP = 'DELETE' OR NEW.replaces_id IS NULL THEN
        RETURN NULL;
    END IF;

    SELECT c.* INTO STRICT v_old FROM sbert.embedding_column c WHERE c.id = NEW.replaces_id;
    SELECT format('((OLD.%1$I IS NULL) <> (NEW.%1$I IS NULL) OR OLD.%1$I OPERATOR(%2$I.<>) NEW.%1$I)',
                  v_old.column_name, n.nspname)
      INTO STRICT v_written
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_namespace n ON n.oid = t.typnamespace
     WHERE a.attrelid = v_relation AND a.attname = v_old.column_name;
    SELECT string_agg(format('(OLD.%1$I)::text COLLATE "C" IS DISTINCT FROM (NEW.%1$I)::text '
                             'COLLATE "C"', name), ' OR ')
      INTO STRICT v_changed
      FROM unnest(v_old.source_columns) AS name;
    -- A worker writes the vector alone; the old version's flush writes text and vector together.
    EXECUTE format(
        'CREATE TRIGGER %I AFTER UPDATE ON %s FOR EACH ROW WHEN (NEW.%I IS NOT NULL AND (%s) AND %s) '
        'EXECUTE FUNCTION sbert.saw_writer_v1(%L)',
        'sbert_' || v_id || '_writer_update', v_table, v_old.column_name, v_changed, v_written,
        v_id);
    EXECUTE format(
        'CREATE TRIGGER %I AFTER INSERT ON %s FOR EACH ROW WHEN (NEW.%I IS NOT NULL AND '
        'current_setting(%L, true) IS DISTINCT FROM ''on'') EXECUTE FUNCTION sbert.saw_writer_v1(%L)',
        'sbert_' || v_id || '_writer_insert', v_table, v_old.column_name, 'sbert.seen_' || v_id,
        v_id);
    RETURN NULL;
END
$body$;
