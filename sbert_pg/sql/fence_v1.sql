-- The binding of a column with which a process may compare vectors: its own encoder's, or one with the
-- same space; else an error. The nil uuid where the column is not bound. Asked once in each query, by
-- the query itself. The process says what it has been compared with: the binding that the column had
-- then, and the fingerprint; NULL for a process that has just compared itself, in this transaction.
CREATE FUNCTION sbert.fence_v1(
    relation regclass, column_name text, fingerprint text, known uuid DEFAULT NULL
)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id uuid;
    v_encoder text;
    v_sealed text;
BEGIN
    -- A binding has one encoder for life, and its identity never returns.
    SELECT b.id INTO v_id FROM sbert.binding b
     WHERE b.relation = fence_v1.relation AND b.column_name = fence_v1.column_name;
    IF v_id = known
        AND coalesce(pg_partition_root(fence_v1.relation), fence_v1.relation) = fence_v1.relation
    THEN
        RETURN v_id;
    END IF;
    v_id := sbert.binding_id_v1(fence_v1.relation, fence_v1.column_name);
    IF v_id IS NULL THEN
        IF fence_v1.fingerprint IS NOT NULL THEN
            PERFORM sbert.require_unswapped_v1(fence_v1.relation, fence_v1.column_name);
        END IF;
        RETURN '00000000-0000-0000-0000-000000000000';
    END IF;
    SELECT b.encoder_name, e.fingerprint INTO v_encoder, v_sealed
      FROM sbert.binding b LEFT JOIN sbert.encoder e ON e.id = b.encoder_id WHERE b.id = v_id;
    IF fence_v1.fingerprint IS NULL OR v_sealed = fence_v1.fingerprint
        OR EXISTS (SELECT FROM sbert.compatible_encoder c
                    WHERE c.binding_id = v_id AND c.fingerprint = fence_v1.fingerprint)
    THEN
        RETURN v_id;
    END IF;
    PERFORM sbert.require_seen_v1(fence_v1.relation);
    RAISE EXCEPTION USING ERRCODE = 'SB001',
        MESSAGE = format('column %I of table %s belongs to encoder "%s" (fingerprint %s), and this '
            'process has an encoder with fingerprint %s', fence_v1.column_name,
            fence_v1.relation::text, v_encoder, coalesce(v_sealed, 'not known yet'),
            coalesce(nullif(fence_v1.fingerprint, ''), 'not known here')),
        DETAIL = 'The column changed hands while the process was running, or was unbound and bound '
                 'again.',
        HINT = 'Use the column''s own encoder, or a column of your own. If the encoder is the '
               'column''s own, try once more.';
END
$body$;
