-- Give a role what it needs in this schema; each capability includes the ones before it.
--   reader  search, status
--   writer  write vectors
--   worker  work off what is pending, backfill
--   binder  bind columns of its own tables, as a migration does
-- Writing texts needs none of them: the triggers run with the rights of whoever bound the column.
CREATE FUNCTION sbert.grant_v1(role_name text, capability text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_function regprocedure;
    v_rank integer := array_position(ARRAY['reader', 'writer', 'worker', 'binder'], capability);
BEGIN
    IF v_rank IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('there is no capability %L', capability),
            HINT = 'Use one of reader, writer, worker and binder.';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA sbert TO %I', role_name);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA sbert TO %I', role_name);
    IF v_rank >= 2 THEN
        EXECUTE format('GRANT EXECUTE ON FUNCTION sbert.seal_v1(integer, text, jsonb, bytea), '
            'sbert.add_compatible_v1(integer, text, jsonb, jsonb), '
            'sbert.attest_v1(regclass, text, text) TO %I', role_name);
        EXECUTE format('GRANT INSERT, UPDATE, DELETE ON sbert.vector_cache TO %I', role_name);
    END IF;
    IF v_rank >= 3 THEN
        EXECUTE format('GRANT INSERT, UPDATE, DELETE ON sbert.pending, sbert.backfill TO %I',
                       role_name);
        EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA sbert TO %I', role_name);
        EXECUTE format('GRANT UPDATE (state, last_audit) ON sbert.embedding_column TO %I', role_name);
    END IF;
    IF v_rank >= 4 THEN
        EXECUTE format('GRANT CREATE ON SCHEMA sbert TO %I', role_name);
        EXECUTE format('GRANT INSERT, UPDATE, DELETE ON sbert.embedding_column, '
            'sbert.compatible_encoder, sbert.old_writer TO %I', role_name);
        -- Not the trigger functions, which could be put on other tables.
        FOR v_function IN
            SELECT p.oid FROM pg_proc p
             WHERE p.pronamespace = 'sbert'::regnamespace AND p.prorettype <> 'trigger'::regtype
        LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', v_function, role_name);
        END LOOP;
    END IF;
END
$body$;
