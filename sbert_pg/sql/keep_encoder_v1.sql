-- Trigger on sbert.encoder: what has been recorded of an encoder decides what may be written, so it
-- is never changed.
CREATE FUNCTION sbert.keep_encoder_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'SB005',
        MESSAGE = format('what is recorded of encoder "%s" (fingerprint %s) cannot be changed',
                         OLD.name, OLD.fingerprint),
        HINT = 'An encoder with other content has another fingerprint and gets a row of its own.';
END
$body$;
