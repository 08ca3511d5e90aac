-- Give a bound column its encoder, if it has none yet, and return the fingerprint of the encoder that
-- it has. Of several processes that try at once the first wins and the others learn of it. For roles
-- that may write the column.
CREATE FUNCTION sbert.seal_v1(
    binding_id uuid, fingerprint text, document_fingerprint text, spec jsonb, probes bytea
)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = seal_v1.binding_id FOR NO KEY UPDATE;
    IF v.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('there is no binding %s', seal_v1.binding_id),
            HINT = 'The column has been unbound. The table sbert.binding lists the bound columns.';
    END IF;
    PERFORM sbert.require_writer_v1(v.id);
    IF v.encoder_id IS NULL THEN
        IF v.dimensions <> (seal_v1.spec ->> 'dimensions')::integer
            OR octet_length(seal_v1.probes) % (v.dimensions * 4) <> 0
        THEN
            RAISE EXCEPTION USING ERRCODE = 'SB001',
                MESSAGE = format('an encoder of %s dimensions cannot fill a column of %s',
                                 seal_v1.spec ->> 'dimensions', v.dimensions);
        END IF;
        INSERT INTO sbert.encoder AS e
            (name, revision, fingerprint, document_fingerprint, dimensions, similarity, spec, probes)
        VALUES (seal_v1.spec ->> 'name', seal_v1.spec ->> 'revision', seal_v1.fingerprint,
                seal_v1.document_fingerprint, v.dimensions, seal_v1.spec ->> 'similarity',
                seal_v1.spec, seal_v1.probes)
        ON CONFLICT (fingerprint, probes_digest) DO NOTHING;
        SELECT e.id INTO STRICT v.encoder_id FROM sbert.encoder e
         WHERE e.fingerprint = seal_v1.fingerprint AND e.probes_digest = sha256(seal_v1.probes);
        UPDATE sbert.binding AS b SET encoder_id = v.encoder_id, sealed_at = now()
         WHERE b.id = seal_v1.binding_id;
    END IF;
    RETURN (SELECT e.fingerprint FROM sbert.encoder e WHERE e.id = v.encoder_id);
END
$body$;
