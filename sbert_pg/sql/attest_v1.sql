-- For writers that do not go through sbert-pg: vouch, until the end of the transaction, that the
-- vectors written to this column come from the encoder with this fingerprint.
CREATE FUNCTION sbert.attest_v1(relation regclass, column_name text, fingerprint text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id integer;
    v_encoder text;
    v_sealed text;
    v_settings text;
BEGIN
    SELECT c.id, c.encoder_name, e.fingerprint INTO v_id, v_encoder, v_sealed
      FROM sbert.embedding_column c LEFT JOIN sbert.encoder e ON e.id = c.encoder_id
     WHERE c.relation = coalesce(pg_partition_root(attest_v1.relation), attest_v1.relation)
       AND c.column_name = attest_v1.column_name;
    IF v_id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('column %I of table %s is not bound',
                             attest_v1.column_name, attest_v1.relation::text),
            HINT = 'Only bound columns need, and take, an attestation.';
    END IF;
    IF v_sealed IS DISTINCT FROM attest_v1.fingerprint AND NOT EXISTS (
        SELECT FROM sbert.compatible_encoder k
         WHERE k.column_id = v_id AND k.fingerprint = attest_v1.fingerprint
    ) THEN
        RAISE EXCEPTION USING ERRCODE = 'SB001',
            MESSAGE = format('column %I of table %s belongs to encoder "%s" (fingerprint %s), and '
                'the writer has an encoder with fingerprint %s', attest_v1.column_name,
                attest_v1.relation::text, v_encoder, coalesce(v_sealed, 'not known yet'),
                attest_v1.fingerprint),
            HINT = CASE WHEN v_sealed IS NULL
                THEN 'The column has not met its encoder yet: start a worker, or write one row '
                     'through sbert-pg.'
                ELSE 'Encode with the column''s own encoder, or add a column for the other one.' END;
    END IF;
    v_settings := coalesce(nullif(current_setting('sbert.attested', true), ''), ',');
    IF strpos(v_settings, ',' || v_id || ',') = 0 THEN
        PERFORM set_config('sbert.attested', v_settings || v_id || ',', true);
    END IF;
END
$body$;
