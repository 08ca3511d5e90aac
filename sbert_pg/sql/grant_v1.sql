-- Give a role what it needs in this schema; each capability includes the ones before it.
--   reader  search, status
--   writer  write vectors
--   worker  work off what is pending, backfill
--   binder  bind columns of its own tables, as a migration does
-- Nothing here gives a right on a table of the application: what a function does for a caller, and
-- which rows of the catalog one sees, follows from the caller's own rights on the bound table.
-- Writing texts needs no capability at all.
CREATE FUNCTION sbert.grant_v1(role_name text, capability text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_function text;
    v_rank integer := array_position(ARRAY['reader', 'writer', 'worker', 'binder'], capability);
BEGIN
    IF v_rank IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('there is no capability %L', capability),
            HINT = 'Use one of reader, writer, worker and binder.';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA sbert TO %I', role_name);
    EXECUTE format('GRANT SELECT ON sbert.encoder, sbert.binding, sbert.compatible_encoder, '
                   'sbert.failure, sbert.claim, sbert.reader, sbert.status, sbert.alembic_version '
                   'TO %I', role_name);
    IF v_rank >= 3 THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON sbert.vector_cache, sbert.claim, '
                       'sbert.failure, sbert.question TO %I', role_name);
    END IF;
    FOR v_function IN
        SELECT p.oid::regprocedure::text
          FROM pg_proc p
          JOIN (VALUES
                ('ask_v1', 1), ('asked_v1', 1), ('base_type_v1', 1), ('binding_id_v1', 1), ('bm25_v1', 1), ('caller_v1', 1), ('companion_v1', 1), ('embed', 1),
                ('expressions_v1', 1), ('faults_v1', 1), ('fence_v1', 1), ('health_v1', 1), ('is_another_v1', 1),
                ('key_columns_v1', 1), ('known_v1', 1), ('last_read_v1', 1), ('name_v1', 1), ('of_sql_v1', 1), ('proof_of_sql_v1', 1), ('proof_sql_v1', 1), ('proven_sql_v1', 1),
                ('proof_v1', 1), ('proven_v1', 1), ('queue_columns_v1', 1), ('queue_ddl_v1', 1),
                ('queue_name_v1', 1), ('require_filled_v1', 1), ('require_seen_v1', 1), ('require_unswapped_v1', 1),
                ('passage_sql_v1', 1), ('saw_v1', 1), ('text_sql_v1', 1),
                ('triggers_v1', 1), ('is_of_v1', 1), ('may_v1', 1), ('vector_type_v1', 1), ('trigger_problems_v1', 1),
                ('add_compatible_v1', 2), ('seal_v1', 2), ('require_writer_v1', 2),
                ('note_v1', 3), ('set_state_v1', 3),
                ('bind_v1', 4), ('disown_v1', 4), ('drop_strays_v1', 4), ('end_replacement_v1', 4), ('forget_v1', 4), ('lacks_default_v1', 4), ('prune_v1', 4),
                ('record_v1', 4), ('refuse_v1', 4), ('rename_v1', 4), ('require_bindable_v1', 4),
                ('require_owner_v1', 4), ('resume_v1', 4), ('set_companion_v1', 4), ('set_triggers_v1', 4),
                ('unbind_v1', 4), ('wake_v1', 4)
               ) AS g (name, rank) ON g.name = p.proname
         WHERE p.pronamespace = 'sbert'::regnamespace AND g.rank <= v_rank
    LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', v_function, role_name);
    END LOOP;
END
$body$;
