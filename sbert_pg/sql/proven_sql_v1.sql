-- Whether a vector is proven by the first half of its companion, or missing, as SQL over both and the
-- proof.
CREATE FUNCTION sbert.proven_sql_v1(value text, companion text, proof text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT format('(%s IS NULL OR substr(replace(%s::text, ''-'', ''''), 1, 16) IS NOT DISTINCT FROM %s)',
                  $1, $2, $3)
$body$;
