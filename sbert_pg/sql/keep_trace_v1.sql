-- Trigger on sbert.binding: each binding has a sequence that holds when its column was last read, in
-- seconds since 1970. What a sequence holds stays also where the reader's transaction is rolled back,
-- as most that only read are.
CREATE FUNCTION sbert.keep_trace_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF TG_OP = 'INSERT' THEN
        EXECUTE format('CREATE SEQUENCE IF NOT EXISTS sbert.%I', 'read_' || NEW.id);
    ELSE
        EXECUTE format('DROP SEQUENCE IF EXISTS sbert.%I', 'read_' || OLD.id);
    END IF;
    RETURN NULL;
END
$body$;
