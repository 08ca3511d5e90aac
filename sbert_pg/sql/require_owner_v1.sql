-- Refuse a caller who does not own a table; for functions that run with their owner's rights.
CREATE FUNCTION sbert.require_owner_v1(relation regclass)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    -- A table that is gone belongs to nobody, and what the catalog says of it may be removed.
    IF EXISTS (SELECT FROM pg_class k WHERE k.oid = require_owner_v1.relation
                AND NOT pg_has_role(sbert.caller_v1(), k.relowner, 'USAGE'))
    THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('must be owner of table %s', require_owner_v1.relation::text);
    END IF;
END
$body$;
