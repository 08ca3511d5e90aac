-- When one of the library's own readers last used a column that is being replaced, to ten seconds or so;
-- NULL where none has. Who it was sbert.reader says, where its transaction was committed.
CREATE FUNCTION sbert.last_read_v1(binding_id uuid)
RETURNS timestamptz
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT to_timestamp(pg_sequence_last_value(format('sbert.%I', 'read_' || $1)::regclass))
$body$;
