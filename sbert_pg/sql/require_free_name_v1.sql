-- Refuse to bind a table that has been put in the place of a bound one by renaming: which of the two
-- is meant only its owner knows.
CREATE FUNCTION sbert.require_free_name_v1(relation regclass, column_name text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b
     WHERE b.bound_name = sbert.name_v1(require_free_name_v1.relation)
       AND b.column_name = require_free_name_v1.column_name
       AND b.relation <> require_free_name_v1.relation
       AND EXISTS (SELECT FROM pg_class k WHERE k.oid = b.relation);
    IF v.id IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('the table that was bound as %s is now %s, and another one has its name',
                             v.bound_name, v.relation::text),
            HINT = format('If the new one takes its place, give the old one up first: SELECT '
                'sbert.unbind_v1(%L, %L). If the old one was only renamed, bind it once under its '
                'new name.', v.relation::text, v.column_name);
    END IF;
END
$body$;
