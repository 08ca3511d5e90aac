-- Raised by the triggers where a vector arrives that nobody has vouched for.
CREATE FUNCTION sbert.refuse_v1(p_column_id integer)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_relation text;
    v_column text;
    v_encoder text;
    v_fingerprint text;
BEGIN
    SELECT format('%I.%I', n.nspname, k.relname), c.column_name, c.encoder_name, e.fingerprint
      INTO v_relation, v_column, v_encoder, v_fingerprint
      FROM sbert.embedding_column c
      JOIN pg_class k ON k.oid = c.relation
      JOIN pg_namespace n ON n.oid = k.relnamespace
      LEFT JOIN sbert.encoder e ON e.id = c.encoder_id
     WHERE c.id = p_column_id;
    RAISE EXCEPTION USING
        ERRCODE = 'SB001',
        MESSAGE = format('column %I of table %s belongs to encoder "%s" (fingerprint %s), and this '
            'transaction has not been held against it', v_column, v_relation, v_encoder,
            coalesce(v_fingerprint, 'not known yet')),
        DETAIL = 'A vector of another encoder in this column would rank wrongly without any error.',
        HINT = format('Write through sbert-pg, or write the text alone and let a worker follow. If '
            'the vector was made by this very encoder, first run in the same transaction: '
            'SELECT sbert.attest_v1(%L, %L, %L)', v_relation, v_column,
            coalesce(v_fingerprint, 'the fingerprint of the encoder'));
END
$body$;
