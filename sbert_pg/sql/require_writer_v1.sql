-- Refuse a caller who may not write a bound table; for functions that run with their owner's rights.
CREATE FUNCTION sbert.require_writer_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_relation regclass;
BEGIN
    SELECT b.relation INTO v_relation FROM sbert.binding b
     WHERE b.id = require_writer_v1.binding_id
       AND NOT has_any_column_privilege(sbert.caller_v1(), b.relation, 'INSERT, UPDATE');
    IF v_relation IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('permission denied to write table %s', v_relation::text);
    END IF;
END
$body$;
