-- The half of a digest that proves a vector, as SQL over an identity and what pgvector sends for the first
-- dimensions.
CREATE FUNCTION sbert.proof_of_sql_v1(identity text, sent text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT format('substr(encode(sha256((%s || coalesce(encode(%s, ''hex''), ''-''))::bytea), ''hex''), 1, 16)',
                  $1, $2)
$body$;
