-- The type that a domain is made of, through every domain in between; any other type as it is.
CREATE FUNCTION sbert.base_type_v1(type_id oid)
RETURNS oid
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    WITH RECURSIVE chain (type_id, is_domain, base_id) AS (
        SELECT t.oid, t.typtype = 'd', t.typbasetype FROM pg_type t WHERE t.oid = $1
        UNION ALL
        SELECT t.oid, t.typtype = 'd', t.typbasetype
          FROM chain c JOIN pg_type t ON t.oid = c.base_id WHERE c.is_domain
    )
    SELECT c.type_id FROM chain c WHERE NOT c.is_domain
$body$;
