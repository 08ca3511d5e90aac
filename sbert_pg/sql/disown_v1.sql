-- Trigger on a bound partitioned table, before the update of a row whose vector nobody has proven and
-- that the update leaves as it is; its argument is the binding. A row that moves to another partition
-- is inserted there, so it has to say that it is pending, or it would be refused as a foreign one.
CREATE FUNCTION sbert.disown_v1()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_companion text;
BEGIN
    SELECT b.companion INTO v_companion FROM sbert.binding b WHERE b.id = TG_ARGV[0]::uuid;
    IF v_companion IS NULL THEN
        RETURN NEW;  -- A trigger without its binding, as from a dump of the table alone.
    END IF;
    RETURN jsonb_populate_record(
        NEW, jsonb_build_object(v_companion, 'ffffffff-ffff-ffff-ffff-ffffffffffff'));
END
$body$;
