-- Whether a row's vector is proven by its companion; true for every row where the column is not bound
-- (NULL) or the row has no vector. Takes what pgvector sends for the first eight dimensions,
-- vector_send(subvector(embedding, 1, 8)). A search asks it of the rows that it is about to answer.
-- They are few, so it is a call: what the planner puts in place, it reads anew for each plan.
CREATE FUNCTION sbert.proven_v1(leading_dimensions bytea, companion uuid, binding_id uuid)
RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    RETURN $1 IS NULL OR $3 IS NULL
        OR substr(replace($2::text, '-', ''), 1, 16)
           IS NOT DISTINCT FROM
           substr(encode(sha256(($3::text || encode($1, 'hex'))::bytea), 'hex'), 1, 16);
END
$body$;
