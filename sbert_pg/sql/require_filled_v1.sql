-- Fail while more rows of a bound column are pending than allowed; for scripts of migrations.
CREATE FUNCTION sbert.require_filled_v1(relation regclass, column_name text, max_missing bigint)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_stale text;
    v_keys text;
    v_count bigint;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b
     WHERE b.relation = require_filled_v1.relation AND b.column_name = require_filled_v1.column_name;
    IF v.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('column %I of table %s is not bound',
                             require_filled_v1.column_name, require_filled_v1.relation::text),
            HINT = 'Bind it first.';
    END IF;
    SELECT x.stale INTO v_stale FROM sbert.expressions_v1(v.id) x;
    SELECT string_agg(quote_ident(key.name), ', ' ORDER BY key.position) INTO v_keys
      FROM unnest(v.key_columns) WITH ORDINALITY AS key (name, position);
    -- Ordered and limited, since a plain count would read the whole table; see sbert.queue_ddl_v1.
    EXECUTE format('SELECT count(*) FROM (SELECT FROM %s WHERE %s AND (%I IS NULL)::integer = 0 '
                   'ORDER BY %s LIMIT %s) AS changed', sbert.name_v1(v.relation), v_stale,
                   v.companion, v_keys, max_missing + 1) INTO v_count;
    IF v_count <= max_missing THEN
        EXECUTE format('SELECT count(*) + %s FROM (SELECT FROM %s WHERE %s AND (%I IS NULL)::integer = 1 '
                       'ORDER BY %s LIMIT %s) AS left_to_fill', v_count, sbert.name_v1(v.relation),
                       v_stale, v.companion, v_keys, max_missing + 1) INTO v_count;
    END IF;
    IF v_count > max_missing THEN
        RAISE EXCEPTION USING ERRCODE = 'SB006',
            MESSAGE = format('more than %s rows of table %s have no vector in column %I yet',
                             max_missing, v.relation::text, v.column_name),
            HINT = 'Run ''sbert-pg backfill'', or let workers finish, and run this script again.';
    END IF;
END
$body$;
