-- Trigger on a bound table: let workers know that there may be something to do; its argument is the
-- binding. Nothing depends on it: workers look by themselves too.
CREATE FUNCTION sbert.wake_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF current_setting('sbert.notify', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('sbert_pending', TG_ARGV[0]);
    END IF;
    RETURN NULL;
END
$body$;
