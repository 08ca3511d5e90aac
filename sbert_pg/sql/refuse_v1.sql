-- Trigger on a bound table, for a row whose vector nobody has proven; its argument is the binding.
CREATE FUNCTION sbert.refuse_v1()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
    v_fingerprint text;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b
     WHERE b.id = TG_ARGV[0]::uuid AND sbert.is_of_v1(TG_RELID, b.id);
    IF v.id IS NULL THEN
        RETURN NULL;  -- Without its binding, as from a dump of the table alone, or on another table.
    END IF;
    SELECT e.fingerprint INTO v_fingerprint FROM sbert.encoder e WHERE e.id = v.encoder_id;
    RAISE EXCEPTION USING ERRCODE = 'SB001',
        MESSAGE = format('column %I of table %s belongs to encoder "%s" (fingerprint %s), and '
            'nothing proves that the vector was made by it', v.column_name,
            sbert.name_v1(v.relation), v.encoder_name, coalesce(v_fingerprint, 'not known yet')),
        DETAIL = 'A vector of another encoder in this column would rank wrongly without any error.',
        HINT = format('Write through sbert-pg, or write the text alone and let a worker follow. If '
            'the vector was made by this very encoder, write %I beside it: '
            'sbert.proof_v1(%L, %L, %L, text, vector). A process that was running before the column '
            'was bound tries once more.', v.companion, sbert.name_v1(v.relation), v.column_name,
            coalesce(v_fingerprint, 'the fingerprint of the encoder'));
END
$body$;
