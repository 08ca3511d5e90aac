-- What is wrong with a binding, in words; no rows where nothing is. Judged by what is there: the
-- queue's index exists, is valid, holds the binding's identity and is made of the columns that the
-- binding's names mean today; the triggers are there and fire; no other table has taken the name.
CREATE FUNCTION sbert.health_v1(binding_id uuid)
RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_name text;
    v_missing text;
    v_index record;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = health_v1.binding_id;
    v_name := sbert.name_v1(v.relation);
    IF v_name IS NULL THEN
        RETURN NEXT 'the table is gone: sbert.prune_v1() forgets it';
        RETURN;
    END IF;
    IF v.bound_name <> v_name AND to_regclass(v.bound_name) IS NOT NULL THEN
        RETURN NEXT format('it was bound as %s, which is the name of another table now: unbind this '
                           'one and bind the other, or bind this one again', v.bound_name);
    END IF;
    SELECT string_agg(quote_ident(n.name), ', ') INTO v_missing
      FROM unnest(ARRAY[v.column_name, v.companion] || v.source_columns || v.key_columns) AS n (name)
     WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = v.relation
                          AND a.attname = n.name AND NOT a.attisdropped);
    IF v_missing IS NOT NULL THEN
        RETURN NEXT format('there is no column %s: sbert.rename_v1() follows a renamed one', v_missing);
    END IF;
    FOR v_index IN SELECT q.* FROM sbert.queue_ddl_v1(v.id) q WHERE q.valid IS NOT TRUE LOOP
        RETURN NEXT format('the index of rows that %s is %s: bind the column again',
            CASE v_index.kind WHEN 'queue' THEN 'are pending' ELSE 'failed' END,
            CASE WHEN v_index.existing IS NULL THEN 'missing' ELSE 'not valid' END);
    END LOOP;
    IF v_missing IS NULL AND sbert.is_another_v1(v.id) THEN
        RETURN NEXT 'a column was renamed and another one has its name: sbert.rename_v1() follows it';
    END IF;
    RETURN QUERY SELECT t.problem FROM sbert.trigger_problems_v1(v.id) AS t (problem);
END
$body$;
