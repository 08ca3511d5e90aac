-- Trigger on a table whose column is being replaced: an old-version writer has written the old
-- column together with its text. Remembered once per transaction and, for one session, at most every
-- ten seconds; no two sessions share a row, so none waits for another.
CREATE FUNCTION sbert.saw_writer_v1()
RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_setting constant text := 'sbert.seen_' || TG_ARGV[0];
BEGIN
    IF current_setting(v_setting, true) = 'on' THEN
        RETURN NULL;
    END IF;
    PERFORM set_config(v_setting, 'on', true);
    INSERT INTO sbert.old_writer AS w (column_id, pid, role, application)
    SELECT c.id, pg_backend_pid(), session_user, current_setting('application_name')
      FROM sbert.embedding_column c WHERE c.id = TG_ARGV[0]::integer
    ON CONFLICT (column_id, pid) DO UPDATE
       SET role = excluded.role, application = excluded.application, seen_at = excluded.seen_at
     WHERE w.seen_at < excluded.seen_at - interval '10 seconds';
    RETURN NULL;
END
$body$;
