-- Follow a renamed column: to be called after ALTER TABLE ... RENAME COLUMN, best in its transaction.
-- Every binding of the table that names the column, as vector, companion, source or key, is rewritten.
-- Returns how many. What a row says does not change: only names do.
CREATE FUNCTION sbert.rename_v1(relation regclass, old_name text, new_name text)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_count integer;
BEGIN
    PERFORM sbert.require_owner_v1(rename_v1.relation);
    IF NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = rename_v1.relation
                      AND a.attname = new_name AND NOT a.attisdropped)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('table %s has no column %I', rename_v1.relation::text, new_name),
            HINT = 'Rename the column first.';
    END IF;
    UPDATE sbert.binding AS b
       SET column_name = CASE WHEN b.column_name = old_name THEN new_name ELSE b.column_name END,
           companion = CASE WHEN b.companion = old_name THEN new_name ELSE b.companion END,
           source = sbert.renamed_source_v1(b.source, old_name, new_name),
           source_columns = array_replace(b.source_columns, old_name, new_name),
           key_columns = array_replace(b.key_columns, old_name, new_name)
     WHERE b.relation = rename_v1.relation
       AND old_name = ANY (ARRAY[b.column_name, b.companion] || b.source_columns || b.key_columns);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END
$body$;
