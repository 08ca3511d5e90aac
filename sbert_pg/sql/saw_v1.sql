-- What the library's own readers and writers leave behind while a column is being replaced, so that
-- the old one is not taken away under them. Does nothing for other columns and on read-only servers.
CREATE FUNCTION sbert.saw_v1(binding_id uuid, wrote boolean)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF current_setting('transaction_read_only') = 'on'
        OR NOT EXISTS (SELECT FROM sbert.binding b WHERE b.replaces_id = saw_v1.binding_id)
        OR NOT EXISTS (SELECT FROM sbert.binding b WHERE b.id = saw_v1.binding_id AND
            has_any_column_privilege(sbert.caller_v1(), b.relation, 'SELECT, INSERT, UPDATE'))
    THEN
        RETURN;
    END IF;
    IF NOT wrote THEN
        PERFORM setval(format('sbert.%I', 'read_' || saw_v1.binding_id)::regclass,
                       floor(extract(epoch FROM clock_timestamp()))::bigint);
    END IF;
    INSERT INTO sbert.reader AS r (binding_id, pid, wrote, role, application)
    VALUES (saw_v1.binding_id, pg_backend_pid(), saw_v1.wrote, session_user,
            current_setting('application_name'))
    ON CONFLICT ON CONSTRAINT reader_pkey DO UPDATE
       SET role = excluded.role, application = excluded.application, seen_at = excluded.seen_at;
END
$body$;
