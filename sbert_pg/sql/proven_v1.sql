-- Whether a row's vector is proven by its companion; true for every row where the column is not bound
-- (NULL) or the row has no vector. Takes what pgvector sends for the first eight dimensions,
-- vector_send(subvector(embedding, 1, 8)). A search asks it of every row that it answers, so it is
-- one expression that the planner puts where it is called; its names were looked up when it was made.
CREATE FUNCTION sbert.proven_v1(leading_dimensions bytea, companion uuid, binding_id uuid)
RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN $1 IS NULL OR $3 IS NULL
    OR substr(replace($2::text, '-', ''), 1, 16)
       IS NOT DISTINCT FROM
       substr(encode(sha256(($3::text || encode($1, 'hex'))::bytea), 'hex'), 1, 16);
