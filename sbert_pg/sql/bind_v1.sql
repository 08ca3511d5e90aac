-- Bind a vector column to an encoder and a source: the catalog row, the companion column, the queue
-- and the triggers. The same again changes nothing but mends what is missing or disabled, follows a
-- column that was only renamed, and takes a free table that carries no binding. Anything else is an
-- error, since a column belongs to one encoder for life. With `defer_indexes` the two indexes are left
-- to the caller, who creates them concurrently (sbert.queue_ddl_v1); until then nothing is worked off.
CREATE FUNCTION sbert.bind_v1(
    relation regclass,
    column_name text,
    declared jsonb,
    source jsonb,
    replaces text DEFAULT NULL,
    defer_indexes boolean DEFAULT false
)
RETURNS uuid
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id uuid;
    v_index record;
BEGIN
    IF NOT pg_has_role((SELECT k.relowner FROM pg_class k WHERE k.oid = bind_v1.relation), 'USAGE') THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('must be owner of table %s', bind_v1.relation::text);
    END IF;
    v_id := sbert.record_v1(bind_v1.relation, bind_v1.column_name, bind_v1.declared,
                            bind_v1.source, bind_v1.replaces);
    PERFORM sbert.drop_strays_v1(bind_v1.relation);
    PERFORM sbert.set_companion_v1(v_id);
    PERFORM sbert.set_triggers_v1(v_id);
    IF NOT defer_indexes THEN
        FOR v_index IN SELECT * FROM sbert.queue_ddl_v1(v_id) d WHERE d.valid IS NOT TRUE LOOP
            IF v_index.existing IS NOT NULL THEN
                EXECUTE format('DROP INDEX %s', v_index.existing);
            END IF;
            BEGIN
                EXECUTE format('CREATE INDEX %I %s', v_index.name, v_index.definition);
            EXCEPTION WHEN invalid_object_definition OR undefined_function OR undefined_column THEN
                RAISE EXCEPTION USING ERRCODE = 'SB003',
                    MESSAGE = format('the text of %s.%I cannot be indexed: %s',
                                     bind_v1.relation::text, bind_v1.column_name, SQLERRM),
                    HINT = 'A source is made of columns whose text does not depend on settings.';
            END;
        END LOOP;
    END IF;
    PERFORM pg_notify('sbert_pending', v_id::text);
    RETURN v_id;
END
$body$;
