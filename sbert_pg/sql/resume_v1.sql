-- Make a bound column the replacement of another one of its table again, as after a finished change
-- that is taken back; for the owner of the table. The same again changes nothing.
CREATE FUNCTION sbert.resume_v1(relation regclass, column_name text, replaces text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_new uuid := (SELECT b.id FROM sbert.binding b WHERE b.relation = resume_v1.relation
                      AND b.column_name = resume_v1.column_name);
    v_old uuid := (SELECT b.id FROM sbert.binding b WHERE b.relation = resume_v1.relation
                      AND b.column_name = resume_v1.replaces);
BEGIN
    PERFORM sbert.require_owner_v1(resume_v1.relation);
    IF v_new IS NULL OR v_old IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('a column of table %s is not bound: %I, or %I that it replaces',
                resume_v1.relation::text, resume_v1.column_name, resume_v1.replaces),
            HINT = 'Bind both before the change goes on.';
    END IF;
    -- Else a change could lead back to its own beginning, and either column be dropped as the old one.
    IF v_new = v_old OR EXISTS (SELECT FROM sbert.binding b WHERE b.id = v_old AND b.replaces_id IS NOT NULL
                                    OR b.replaces_id = v_old AND b.id <> v_new)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB002',
            MESSAGE = format('column %I of table %s cannot be what %I replaces: it is that column itself, '
                'replaces one, or is being replaced by another', resume_v1.replaces,
                resume_v1.relation::text, resume_v1.column_name),
            HINT = 'Name the new column first, then the old one. Finish or abort another change before.';
    END IF;
    UPDATE sbert.binding AS b SET replaces_id = v_old
     WHERE b.id = v_new AND b.replaces_id IS DISTINCT FROM v_old;
END
$body$;
