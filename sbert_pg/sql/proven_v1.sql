-- Whether a row's vector is proven by its companion; true for every row where the column is not bound
-- (NULL) or the row has no vector. Takes what pgvector sends for the first eight dimensions,
-- vector_send(subvector(embedding, 1, 8)). A search asks it of the rows that it is about to answer.
-- They are few, so it is a call: what the planner puts in place, it reads anew for each plan. Its body
-- is what the other functions write into statements.
DO $do$
BEGIN
    EXECUTE format(
        'CREATE FUNCTION sbert.proven_v1(leading_dimensions bytea, companion uuid, binding_id uuid) '
        'RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE '
        'SET search_path = pg_catalog, pg_temp AS %L',
        'BEGIN RETURN $3 IS NULL OR '
        || sbert.proven_sql_v1('$1', '$2', sbert.proof_of_sql_v1('$3::text', '$1')) || '; END');
END
$do$;
