-- The role whose rights count inside a function that runs with its owner's: that of SET ROLE, else
-- the one that logged in. Nobody can set a role that is not granted to them.
CREATE FUNCTION sbert.caller_v1()
RETURNS name
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT CASE WHEN current_setting('role') = 'none' THEN session_user
                ELSE current_setting('role')::name END
$body$;
