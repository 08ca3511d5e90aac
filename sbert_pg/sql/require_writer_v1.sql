-- Refuse a caller who may not write a bound column; for functions that run with their owner's rights.
CREATE FUNCTION sbert.require_writer_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_relation regclass;
    v_column text;
BEGIN
    SELECT b.relation, b.column_name INTO v_relation, v_column FROM sbert.binding b
     WHERE b.id = require_writer_v1.binding_id
       AND NOT sbert.may_v1(sbert.caller_v1(), b.relation, ARRAY[b.column_name], 'INSERT, UPDATE');
    IF v_relation IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('permission denied to write column %I of table %s', v_column,
                             v_relation::text);
    END IF;
END
$body$;
