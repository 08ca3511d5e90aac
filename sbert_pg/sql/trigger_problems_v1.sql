-- Which triggers of a binding are missing, or do not fire in ordinary sessions, in words.
CREATE FUNCTION sbert.trigger_problems_v1(binding_id uuid)
RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT format('the trigger that %s %s: bind the column again', k.words,
                  CASE WHEN count(t.kind) = 0 THEN 'is missing' ELSE 'is disabled' END)
      FROM (VALUES ('refuse_insert', 'refuses foreign vectors of new rows'),
                   ('refuse_update', 'refuses foreign vectors of changed rows'),
                   ('disown', 'lets rows with foreign vectors move between partitions'),
                   ('wake', 'wakes workers')) AS k (kind, words)
      LEFT JOIN sbert.triggers_v1($1) t ON t.kind = k.kind
     WHERE k.kind <> 'disown' OR EXISTS (
               SELECT FROM sbert.binding b JOIN pg_class c ON c.oid = b.relation AND c.relkind = 'p'
                WHERE b.id = $1)
     GROUP BY k.kind, k.words
    HAVING NOT coalesce(bool_or(t.enabled), false)
$body$;
