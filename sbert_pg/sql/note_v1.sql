-- What a worker finds about a column as a whole: since when every committed text has its vector, and
-- what the last audit said. NULL leaves a value as it is. For roles that may write the column.
CREATE FUNCTION sbert.note_v1(
    binding_id uuid, caught_up_at timestamptz DEFAULT NULL, last_audit jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    PERFORM sbert.require_writer_v1(note_v1.binding_id);
    UPDATE sbert.binding AS b
       SET caught_up_at = greatest(b.caught_up_at, note_v1.caught_up_at),
           last_audit = coalesce(note_v1.last_audit, b.last_audit)
     WHERE b.id = note_v1.binding_id;
END
$body$;
