-- Forget bindings whose table has been dropped; returns how many.
CREATE FUNCTION sbert.prune_v1()
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_id integer;
    v_count integer := 0;
BEGIN
    FOR v_id IN
        SELECT c.id FROM sbert.embedding_column c
         WHERE NOT EXISTS (SELECT FROM pg_class k WHERE k.oid = c.relation)
    LOOP
        PERFORM sbert.forget_v1(v_id);
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END
$body$;
