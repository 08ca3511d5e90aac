-- A name for an index of a binding, short enough and in nobody's way: readable where table and
-- column are short, always with a part of the identity. Nothing is ever found by it.
CREATE FUNCTION sbert.queue_name_v1(
    binding_id uuid, relation regclass, column_name text, kind text
)
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT wish.name || CASE WHEN taken.oid IS NULL THEN ''
                             ELSE '_' || left(gen_random_uuid()::text, 2) END
      FROM pg_class k
     CROSS JOIN LATERAL (
        SELECT format('sbert_%s_%s_%s', $4,
                      CASE WHEN octet_length(k.relname || '_' || $3) <= 35
                           THEN k.relname || '_' || $3 ELSE 'column' END,
                      left(replace($1::text, '-', ''), 8)) AS name
      ) AS wish
      LEFT JOIN pg_class taken
        ON taken.relname = wish.name AND taken.relnamespace = k.relnamespace
     WHERE k.oid = $2
$body$;
