-- Mark every row of a column pending; returns how many marks are new.
CREATE FUNCTION sbert.mark_all_pending_v1(column_id integer)
RETURNS bigint
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT sbert.mark_pending_v1($1, true)
$body$;
