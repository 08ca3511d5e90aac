-- Refuse a table that is not bound and has the name under which another one was.
CREATE FUNCTION sbert.require_unswapped_v1(relation regclass, column_name text)
RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
    v_relation regclass := coalesce(pg_partition_root(relation), relation);
BEGIN
    SELECT b.* INTO v FROM sbert.binding b JOIN pg_class k ON k.oid = b.relation
     WHERE b.bound_name = sbert.name_v1(v_relation)
       AND b.column_name = require_unswapped_v1.column_name
       AND b.relation <> v_relation;
    IF v.id IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB001',
            MESSAGE = format('table %s is not the one that was bound under this name, which is %s now',
                             v.bound_name, v.relation::text),
            HINT = format('If it takes the other one''s place: SELECT sbert.unbind_v1(%L, %L), then '
                'bind this one.', v.relation::text, v.column_name);
    END IF;
END
$body$;
