-- What to write beside a vector, for writers that do not go through sbert-pg: the digest of the text
-- and of the vector, after comparing the fingerprint of the encoder with the column's. The text is
-- that of the row's source; NULL for a row without one.
CREATE FUNCTION sbert.proof_v1(
    relation regclass, column_name text, fingerprint text, document text, embedding anyelement
)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
    v_sealed text;
    v_digest uuid;
    v_schema name;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b
     WHERE b.id = sbert.binding_id_v1(proof_v1.relation, proof_v1.column_name);
    IF v.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = format('column %I of table %s is not bound', proof_v1.column_name,
                             proof_v1.relation::text),
            HINT = 'Only bound columns need, and take, a proof.';
    END IF;
    SELECT e.fingerprint INTO v_sealed FROM sbert.encoder e WHERE e.id = v.encoder_id;
    IF v_sealed IS NULL OR proof_v1.fingerprint IS NULL THEN
        PERFORM sbert.require_seen_v1(v.relation);
        RAISE EXCEPTION USING ERRCODE = 'SB001',
            MESSAGE = format('column %I of table %s belongs to encoder "%s", whose fingerprint is %s',
                v.column_name, v.relation::text, v.encoder_name,
                CASE WHEN v_sealed IS NULL THEN 'not known yet' ELSE 'needed' END),
            HINT = 'Start a worker, or write one row through sbert-pg; then give the fingerprint of '
                   'the encoder that made the vector.';
    END IF;
    PERFORM sbert.fence_v1(v.relation, v.column_name, proof_v1.fingerprint);
    -- Functions over any other type would be somebody else's, and run with the owner's rights.
    IF sbert.vector_type_v1(pg_typeof(proof_v1.embedding)) IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('the vector for column %I of table %s has type %s', v.column_name,
                             v.relation::text, pg_typeof(proof_v1.embedding)),
            HINT = format('Cast it to %s.', v.storage);
    END IF;
    SELECT n.nspname INTO v_schema FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace
     WHERE x.extname = 'vector';
    EXECUTE format('SELECT (%s || %s)::uuid',
                   sbert.proof_sql_v1(v.id, v.storage, v.dimensions,
                                      format('$1::%I.%I', v_schema, v.storage)),
                   -- A document is cut by workers, so its row stays pending.
                   CASE WHEN v.source ? 'passages' THEN '''0000000000000000'''
                        ELSE sbert.of_sql_v1(v.id, '$2') END)
       INTO v_digest USING proof_v1.embedding, proof_v1.document;
    RETURN v_digest;
END
$body$;
