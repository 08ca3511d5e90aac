-- Refuse a caller who may do nothing with a table, before a message says what its column belongs to;
-- for functions that run with their owner's rights.
CREATE FUNCTION sbert.require_seen_v1(relation regclass)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF NOT has_any_column_privilege(sbert.caller_v1(), require_seen_v1.relation,
                                    'SELECT, INSERT, UPDATE')
    THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('permission denied for table %s', require_seen_v1.relation::text);
    END IF;
END
$body$;
