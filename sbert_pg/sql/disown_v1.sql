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
    -- The column is looked at too: a cast to whatever type it has would run with the owner's rights.
    SELECT b.companion INTO v_companion
      FROM sbert.binding b
      JOIN pg_attribute a ON a.attrelid = TG_RELID AND a.attname = b.companion
                         AND a.atttypid = 'uuid'::regtype AND NOT a.attisdropped
     WHERE b.id = TG_ARGV[0]::uuid AND sbert.is_of_v1(TG_RELID, b.id);
    IF v_companion IS NULL THEN
        RETURN NEW;  -- Without its binding, as from a dump of the table alone.
    END IF;
    RETURN jsonb_populate_record(
        NEW, jsonb_build_object(v_companion, 'ffffffff-ffff-ffff-ffff-ffffffffffff'));
END
$body$;
