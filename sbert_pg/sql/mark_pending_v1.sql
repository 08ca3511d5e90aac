-- Mark rows of a table pending: those without the vector they should have, or everything. Rows that
-- are marked already keep their mark, except that failed ones are tried again. Returns how many marks
-- are new.
CREATE FUNCTION sbert.mark_pending_v1(p_column_id integer, p_everything boolean DEFAULT false)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.embedding_column;
    v_table text;
    v_no_text text;
    v_count bigint;
BEGIN
    SELECT * INTO v FROM sbert.embedding_column WHERE id = p_column_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('no column is bound under number %s', p_column_id),
            HINT = 'The table sbert.embedding_column lists the bound columns.';
    END IF;
    SELECT format('%I.%I', n.nspname, k.relname) INTO STRICT v_table
      FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace WHERE k.oid = v.relation;
    SELECT string_agg(format('r.%I IS NULL', name), ' AND ') INTO v_no_text
      FROM unnest(v.source_columns) AS name;
    UPDATE sbert.pending SET failed = false, skipped = false, attempts = 0, next_attempt_at = NULL
     WHERE column_id = p_column_id AND failed;
    EXECUTE format(
        'INSERT INTO sbert.pending AS p (column_id, key) SELECT %s, k.key FROM '
        '(SELECT %s AS key FROM %s AS r WHERE %s) AS k ORDER BY k.key '
        'ON CONFLICT (column_id, key) DO NOTHING',
        v.id, sbert.key_expression_v1(v.relation, v.key_columns, 'r'), v_table,
        CASE WHEN p_everything THEN format('r.%I IS NOT NULL OR NOT (%s)', v.column_name, v_no_text)
             ELSE format('(r.%I IS NULL) <> (%s)', v.column_name, v_no_text) END);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM pg_notify('sbert_pending', v.id::text);
    RETURN v_count;
END
$body$;
