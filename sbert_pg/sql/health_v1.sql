-- What is wrong with a binding, in words; no rows where nothing is: what keeps workers from it, whether
-- another table has taken the name, and whether the companion's default and the other index are there
-- and the triggers fire.
CREATE FUNCTION sbert.health_v1(binding_id uuid)
RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_name text;
BEGIN
    RETURN QUERY SELECT f.problem FROM sbert.faults_v1(health_v1.binding_id) AS f (problem);
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = health_v1.binding_id;
    v_name := sbert.name_v1(v.relation);
    IF v_name IS NULL THEN
        RETURN;
    END IF;
    IF v.bound_name <> v_name AND to_regclass(v.bound_name) IS NOT NULL THEN
        RETURN NEXT format('it was bound as %s, which is the name of another table now: unbind this '
                           'one and bind the other, or bind this one again', v.bound_name);
    END IF;
    IF EXISTS (SELECT FROM pg_inherits i JOIN pg_class k ON k.oid = i.inhparent AND k.relkind = 'r'
                WHERE k.oid = v.relation)
    THEN
        RETURN NEXT 'tables inherit from it, whose rows are in no index of it: bind those instead';
    END IF;
    RETURN QUERY SELECT format('column %I does not default to the nil uuid, by which a new row is '
                               'known: bind the column again', v.companion)
      WHERE sbert.lacks_default_v1(v.relation, v.companion);
    RETURN QUERY SELECT format('the index of rows that failed is %s: bind the column again',
                               CASE WHEN q.existing IS NULL THEN 'missing' ELSE 'not valid' END)
      FROM sbert.queue_ddl_v1(v.id) q WHERE q.kind = 'failed' AND q.valid IS NOT TRUE;
    RETURN QUERY SELECT t.problem FROM sbert.trigger_problems_v1(v.id) AS t (problem);
END
$body$;
