-- A table's name with its schema, quoted where it has to be.
CREATE FUNCTION sbert.name_v1(relation regclass)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $body$
    SELECT format('%I.%I', n.nspname, k.relname)
      FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace WHERE k.oid = $1
$body$;
