-- Follow columns of a bound table that were only renamed: where exactly one name that a binding knows
-- is gone, one name that is asked for is new to it, and the column behind the new name is the one that
-- the queue's index was made of. Everything else is left to whoever compares.
CREATE FUNCTION sbert.follow_rename_v1(relation regclass, column_name text, sources text[])
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_gone text[];
    v_new text[];
BEGIN
    FOR v IN SELECT b.* FROM sbert.binding b WHERE b.relation = follow_rename_v1.relation LOOP
        SELECT array_agg(n.name) INTO v_gone
          FROM unnest(v.column_name || v.source_columns || v.key_columns) AS n (name)
         WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = v.relation
                              AND a.attname = n.name AND NOT a.attisdropped);
        SELECT array_agg(a.attname::text) INTO v_new
          FROM pg_attribute a
         WHERE a.attrelid = v.relation AND NOT a.attisdropped
           AND a.attname = ANY (follow_rename_v1.column_name || sources
                            || sbert.key_columns_v1(v.relation))
           AND NOT a.attname = ANY (v.column_name || v.source_columns || v.key_columns)
           AND a.attnum IN (SELECT sbert.queue_columns_v1(v.id));
        IF cardinality(v_gone) = 1 AND cardinality(v_new) = 1 THEN
            PERFORM sbert.rename_v1(v.relation, v_gone[1], v_new[1]);
        END IF;
    END LOOP;
END
$body$;
