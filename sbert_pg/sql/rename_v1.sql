-- Follow a renamed column: to be called in the transaction of ALTER TABLE ... RENAME COLUMN, after
-- it. Every binding of the table that names the column, as vector, source or key, is rewritten.
CREATE FUNCTION sbert.rename_v1(relation regclass, old_name text, new_name text)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.embedding_column;
    v_source jsonb;
    v_count integer := 0;
BEGIN
    FOR v IN SELECT c.* FROM sbert.embedding_column c
              WHERE c.relation = rename_v1.relation
                AND old_name = ANY (c.column_name || c.source_columns || c.key_columns)
                FOR UPDATE
    LOOP
        v_source := jsonb_set(v.source, '{columns}',
            to_jsonb(array_replace(v.source_columns, old_name, new_name)));
        IF v.source ->> 'pattern' IS NOT NULL THEN
            -- A doubled brace stands for itself.
            v_source := jsonb_set(v_source, '{pattern}', to_jsonb(regexp_replace(
                v.source ->> 'pattern', '(?<!\{)((?:\{\{)*)\{' || old_name || '\}',
                '\1{' || new_name || '}', 'g')));
        END IF;
        PERFORM set_config('sbert.maintenance', 'on', true);
        UPDATE sbert.embedding_column AS c
           SET column_name = CASE WHEN c.column_name = old_name THEN new_name
                                  ELSE c.column_name END,
               source = v_source,
               source_columns = array_replace(c.source_columns, old_name, new_name),
               key_columns = array_replace(c.key_columns, old_name, new_name)
         WHERE c.id = v.id;
        PERFORM set_config('sbert.maintenance', 'off', true);
        PERFORM sbert.install_triggers_v1(v.id);
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END
$body$;
