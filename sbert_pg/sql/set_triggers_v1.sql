-- Put the triggers of a binding on its table, where they are not there and enabled already. They are
-- conveniences: one refuses a foreign vector early, the other wakes workers. What a row is is decided
-- by the row, also where no trigger ran. The refusal comes after the write, so that stored generated
-- columns keep their use, and looks at a vector that was moved or restored as it is: a row that says
-- itself that its vector is nobody's (NULL, as before the column was bound, or all ones) may come.
CREATE FUNCTION sbert.set_triggers_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
    v_table text;
    v_claims text;
    v_proof text;
    v_unproven text;
    v_changed text;
    v_name text;
    v_trigger record;
BEGIN
    SELECT b.* INTO STRICT v FROM sbert.binding b WHERE b.id = binding_id;
    v_table := sbert.name_v1(v.relation);
    v_claims := format('NEW.%1$I IS NOT NULL AND NEW.%1$I <> %2$L::uuid',
                       v.companion, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
    v_proof := sbert.proof_sql_v1(v.id, v.storage, v.dimensions, format('NEW.%I', v.column_name));
    v_unproven := 'NOT ' || sbert.proven_sql_v1(
        format('NEW.%I', v.column_name), format('NEW.%I', v.companion), v_proof);
    v_changed := format('(%s IS DISTINCT FROM %s)', v_proof,
        sbert.proof_sql_v1(v.id, v.storage, v.dimensions, format('OLD.%I', v.column_name)));
    FOR v_trigger IN
        SELECT * FROM (VALUES
            ('refuse_insert', format('AFTER INSERT ON %s FOR EACH ROW WHEN (%s AND %s)',
                                     v_table, v_claims, v_unproven), 'refuse_v1'),
            ('refuse_update', format('AFTER UPDATE OF %I, %I ON %s FOR EACH ROW WHEN (%s AND %s)',
                                     v.column_name, v.companion, v_table, v_unproven, v_changed),
                                     'refuse_v1'),
            ('disown', format('BEFORE UPDATE ON %s FOR EACH ROW WHEN (%s AND %s AND NOT %s)',
                              v_table, v_claims, v_unproven, v_changed), 'disown_v1'),
            ('wake', format('AFTER INSERT OR UPDATE ON %s FOR EACH STATEMENT', v_table), 'wake_v1')
        ) AS w (kind, clause, function_name)
         WHERE NOT EXISTS (SELECT FROM sbert.triggers_v1(v.id) t
                            WHERE t.kind = w.kind AND t.enabled)
           AND (w.kind <> 'disown'
                OR EXISTS (SELECT FROM pg_class k WHERE k.oid = v.relation AND k.relkind = 'p'))
    LOOP
        FOR v_name IN SELECT t.name FROM sbert.triggers_v1(v.id) t WHERE t.kind = v_trigger.kind LOOP
            EXECUTE format('DROP TRIGGER %I ON %s', v_name, v_table);
        END LOOP;
        EXECUTE format('CREATE TRIGGER %I %s EXECUTE FUNCTION sbert.%I(%L)',
                       format('sbert_%s_%s', v_trigger.kind, left(replace(v.id::text, '-', ''), 8)),
                       v_trigger.clause, v_trigger.function_name, v.id);
    END LOOP;
END
$body$;
