-- Whether a process whose encoder has this fingerprint may compare vectors with a column: true where
-- the column is not bound, or belongs to that encoder or one with the same space; else an error. Asked
-- once in each query, by the query itself. NULL: the process has just compared itself, in the same
-- transaction.
CREATE FUNCTION sbert.fence_v1(relation regclass, column_name text, fingerprint text)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id uuid;
    v_encoder text;
    v_sealed text;
BEGIN
    SELECT b.id, b.encoder_name, e.fingerprint INTO v_id, v_encoder, v_sealed
      FROM sbert.binding b LEFT JOIN sbert.encoder e ON e.id = b.encoder_id
     WHERE b.relation = fence_v1.relation AND b.column_name = fence_v1.column_name;
    IF fence_v1.fingerprint IS NULL
        OR (v_sealed = fence_v1.fingerprint
            AND coalesce(pg_partition_root(fence_v1.relation), fence_v1.relation) = fence_v1.relation)
    THEN
        RETURN true;
    END IF;
    IF v_id IS NULL OR v_id <> sbert.binding_id_v1(fence_v1.relation, fence_v1.column_name) THEN
        RETURN sbert.fence_unbound_v1(fence_v1.relation, fence_v1.column_name, fence_v1.fingerprint);
    END IF;
    IF v_sealed = fence_v1.fingerprint OR EXISTS (SELECT FROM sbert.compatible_encoder c
                WHERE c.binding_id = v_id AND c.fingerprint = fence_v1.fingerprint)
    THEN
        RETURN true;
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
