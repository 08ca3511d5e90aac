-- Remove indexes and triggers of bindings that are not this table's: of another table that it was copied
-- from, of another database, or of a catalog that was dropped. They would cost each write and do nothing.
CREATE FUNCTION sbert.drop_strays_v1(relation regclass)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_name text;
BEGIN
    FOR v_name IN
        SELECT sbert.name_v1(i.indexrelid)
          FROM pg_index i
         CROSS JOIN LATERAL pg_get_expr(i.indpred, i.indrelid) AS predicate
         CROSS JOIN LATERAL substring(predicate FROM 'sha256[(]+''([0-9a-f-]{36})''::text') AS of_binding
         WHERE i.indrelid = drop_strays_v1.relation AND strpos(predicate, 'subvector(') > 0
           AND of_binding IS NOT NULL
           AND NOT EXISTS (SELECT FROM sbert.binding b
                            WHERE b.id::text = of_binding AND b.relation = drop_strays_v1.relation)
    LOOP
        EXECUTE format('DROP INDEX %s', v_name);
    END LOOP;
    FOR v_name IN
        SELECT t.tgname FROM pg_trigger t
         WHERE t.tgrelid = drop_strays_v1.relation AND NOT t.tgisinternal AND t.tgparentid = 0
           AND t.tgfoid IN ('sbert.refuse_v1()'::regprocedure, 'sbert.disown_v1()'::regprocedure,
                            'sbert.wake_v1()'::regprocedure)
           AND NOT EXISTS (SELECT FROM sbert.binding b
                            WHERE t.tgargs = convert_to(b.id::text, 'UTF8') || decode('00', 'hex')
                              AND b.relation = drop_strays_v1.relation)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_name, sbert.name_v1(drop_strays_v1.relation));
    END LOOP;
END
$body$;
