-- Record that another encoder has been shown to share the space of a column's encoder.
CREATE FUNCTION sbert.add_compatible_v1(
    column_id integer, fingerprint text, spec jsonb, agreement jsonb
)
RETURNS void
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    INSERT INTO sbert.compatible_encoder AS c (column_id, fingerprint, spec, agreement)
    VALUES ($1, $2, $3, $4)
    ON CONFLICT (column_id, fingerprint) DO NOTHING
$body$;
