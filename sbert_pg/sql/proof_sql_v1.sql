-- The same as SQL over a value of the given storage.
CREATE FUNCTION sbert.proof_sql_v1(
    binding_id uuid, storage text, dimensions integer, value text
)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT sbert.proof_of_sql_v1(
               format('%L::text', $1),
               format('%I.%I(%I.subvector(%s, 1, %s))',
                      n.nspname, $2 || '_send', n.nspname, $4, least($3, 8)))
      FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace
     WHERE x.extname = 'vector'
$body$;
