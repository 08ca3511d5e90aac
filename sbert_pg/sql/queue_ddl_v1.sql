-- The two indexes of a binding: one row each, with the index that is there now, if any. The queue
-- holds what is pending, new and changed rows before a backfill's; the other the rows that failed.
-- An index is recognised by what it says, never by its name. `definition` stands behind
-- CREATE INDEX [CONCURRENTLY] `name`.
CREATE FUNCTION sbert.queue_ddl_v1(binding_id uuid)
RETURNS TABLE (kind text, name text, definition text, existing regclass, valid boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_keys text;
    v_on text;
    v_stale text;
    v_failed text;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = queue_ddl_v1.binding_id;
    SELECT x.stale, x.failed INTO v_stale, v_failed FROM sbert.expressions_v1(v.id) x;
    SELECT format('%I.%I', n.nspname, k.relname) INTO v_on
      FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace WHERE k.oid = v.relation;
    SELECT string_agg(quote_ident(key.name), ', ' ORDER BY key.position) INTO v_keys
      FROM unnest(v.key_columns) WITH ORDINALITY AS key (name, position);
    RETURN QUERY
    SELECT w.kind, sbert.queue_name_v1(v.id, v.relation, v.column_name, w.kind), w.definition,
           i.indexrelid::regclass, i.indisvalid
      FROM (VALUES
            ('queue', format('ON %s (((%I IS NULL)::integer), %s) WHERE %s',
                             v_on, v.companion, v_keys, v_stale)),
            ('failed', format('ON %s (%s) WHERE %s', v_on, v_keys, v_failed))
           ) AS w (kind, definition)
      LEFT JOIN LATERAL (
        SELECT i.indexrelid, i.indisvalid
          FROM pg_index i, pg_get_expr(i.indpred, i.indrelid) AS predicate
         WHERE i.indrelid = v.relation AND i.indpred IS NOT NULL
           AND (w.kind = 'queue') = (i.indexprs IS NOT NULL) AND strpos(predicate, v.id::text) > 0
         ORDER BY i.indisvalid DESC, i.indexrelid LIMIT 1
      ) AS i ON true;
END
$body$;
