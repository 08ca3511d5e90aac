-- The triggers of a binding that are on its table now, known by their function and argument, never
-- by their names. `enabled` says whether one fires in ordinary sessions, on every partition too.
CREATE FUNCTION sbert.triggers_v1(binding_id uuid)
RETURNS TABLE (kind text, name text, enabled boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT CASE WHEN t.tgfoid = 'sbert.wake_v1()'::regprocedure THEN 'wake'
                WHEN t.tgfoid = 'sbert.disown_v1()'::regprocedure THEN 'disown'
                WHEN t.tgtype & 16 <> 0 THEN 'refuse_update'
                ELSE 'refuse_insert' END,
           t.tgname::text,
           t.tgenabled IN ('O', 'A') AND NOT EXISTS (
               SELECT FROM pg_trigger p WHERE p.tgparentid = t.oid AND p.tgenabled NOT IN ('O', 'A'))
      FROM sbert.binding b JOIN pg_trigger t ON t.tgrelid = b.relation
     WHERE b.id = $1 AND NOT t.tgisinternal
       AND t.tgfoid IN ('sbert.refuse_v1()'::regprocedure, 'sbert.disown_v1()'::regprocedure,
                        'sbert.wake_v1()'::regprocedure)
       AND t.tgargs = convert_to(b.id::text, 'UTF8') || decode('00', 'hex')
$body$;
