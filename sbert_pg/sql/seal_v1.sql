-- Give a bound column its encoder, if it has none yet, and return the fingerprint of the encoder
-- that it has. Of several processes that try at once the first wins and the others learn of it.
CREATE FUNCTION sbert.seal_v1(
    column_id integer, fingerprint text, spec jsonb, probes bytea
)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_encoder_id integer;
    v_dimensions integer;
BEGIN
    SELECT c.encoder_id, c.dimensions INTO v_encoder_id, v_dimensions
      FROM sbert.embedding_column c WHERE c.id = seal_v1.column_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('no column is bound under number %s', seal_v1.column_id),
            HINT = 'It has been unbound. The table sbert.embedding_column lists the bound columns.';
    END IF;
    IF v_encoder_id IS NULL THEN
        IF v_dimensions <> (seal_v1.spec ->> 'dimensions')::integer THEN
            RAISE EXCEPTION USING ERRCODE = 'SB001',
                MESSAGE = format('an encoder of %s dimensions cannot fill a column of %s',
                                 seal_v1.spec ->> 'dimensions', v_dimensions);
        END IF;
        INSERT INTO sbert.encoder AS e
            (name, revision, fingerprint, dimensions, similarity, spec, probes)
        VALUES (seal_v1.spec ->> 'name', seal_v1.spec ->> 'revision', seal_v1.fingerprint,
                v_dimensions, seal_v1.spec ->> 'similarity', seal_v1.spec, seal_v1.probes)
        ON CONFLICT (fingerprint) DO NOTHING;
        SELECT e.id INTO STRICT v_encoder_id FROM sbert.encoder e
         WHERE e.fingerprint = seal_v1.fingerprint;
        UPDATE sbert.embedding_column AS c SET encoder_id = v_encoder_id, sealed_at = now()
         WHERE c.id = seal_v1.column_id;
    END IF;
    RETURN (SELECT e.fingerprint FROM sbert.encoder e WHERE e.id = v_encoder_id);
END
$body$;
