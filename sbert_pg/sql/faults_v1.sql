-- Why workers leave a column alone, in words; no rows where they do not. Judged by what is there: the
-- columns that the binding names, and the queue's index, which holds the binding's identity and is made
-- of those very columns.
CREATE FUNCTION sbert.faults_v1(binding_id uuid)
RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_columns text[];
    v_words text;
    v_is_gone boolean;
    v_is_there boolean;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = faults_v1.binding_id;
    IF sbert.name_v1(v.relation) IS NULL THEN
        RETURN NEXT 'the table is gone: sbert.prune_v1() forgets it';
        RETURN;
    END IF;
    IF NOT sbert.is_of_v1(v.relation, v.id) THEN
        RETURN NEXT format('it is a partition of a bound table now, %s: unbind it',
                           sbert.name_v1(pg_partition_root(v.relation)));
    END IF;
    v_columns := ARRAY[v.column_name, v.companion] || v.source_columns || v.key_columns;
    SELECT string_agg(quote_ident(n.name), ', ') INTO v_words FROM unnest(v_columns) AS n (name)
     WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = v.relation
                          AND a.attname = n.name AND NOT a.attisdropped);
    v_is_gone := v_words IS NOT NULL;
    IF v_is_gone THEN
        RETURN NEXT format('there is no column %s: sbert.rename_v1() follows a renamed one', v_words);
    END IF;
    SELECT string_agg(format('%I has type %s', a.attname, a.atttypid::regtype), ', ') INTO v_words
      FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
     WHERE a.attrelid = v.relation AND NOT a.attisdropped
       AND (a.attname = ANY (v.source_columns) AND t.typcategory <> 'S'
            OR a.attname = v.column_name AND sbert.vector_type_v1(t.oid) IS DISTINCT FROM v.storage
            OR a.attname = v.companion AND t.oid <> 'uuid'::regtype);
    IF v_words IS NOT NULL THEN
        RETURN NEXT format('%s, with which it could not be bound: give it its old type again', v_words);
    END IF;
    SELECT string_agg(quote_ident(r.rulename), ', ') INTO v_words
      FROM pg_rewrite r WHERE r.ev_class = v.relation AND r.ev_type = '2' AND r.ev_enabled <> 'D';
    IF v_words IS NOT NULL THEN
        RETURN NEXT format('its rule for UPDATE, %s, keeps vectors from being written: make it a trigger',
                           v_words);
    END IF;
    SELECT bool_or(q.valid) INTO v_is_there
      FROM sbert.queue_ddl_v1(v.id) q WHERE q.kind = 'queue' AND q.existing IS NOT NULL;
    IF v_is_there IS NOT TRUE THEN
        RETURN NEXT format('the index of rows that are pending is %s: bind the column again, or wait '
                           'for its build', CASE WHEN v_is_there IS NULL THEN 'missing' ELSE 'not valid' END);
    ELSIF NOT v_is_gone AND sbert.is_another_v1(v.id) THEN
        RETURN NEXT 'a column was renamed and another one has its name: sbert.rename_v1() follows it';
    END IF;
END
$body$;
