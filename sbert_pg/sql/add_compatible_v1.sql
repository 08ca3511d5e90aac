-- Record that another encoder has been shown to share the space of a column's encoder. For roles that
-- may write the column.
CREATE FUNCTION sbert.add_compatible_v1(
    binding_id uuid, fingerprint text, spec jsonb, agreement jsonb
)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.require_writer_v1(add_compatible_v1.binding_id);
    INSERT INTO sbert.compatible_encoder AS c (binding_id, fingerprint, spec, agreement)
    VALUES ($1, $2, $3, $4) ON CONFLICT ON CONSTRAINT compatible_encoder_pkey DO NOTHING;
END
$body$;
