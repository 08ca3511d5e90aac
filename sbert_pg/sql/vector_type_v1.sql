-- What stores vectors of this type: 'vector' or 'halfvec' for those of the extension; NULL for any
-- other type, also of one of these names, since functions over it would be somebody else's.
CREATE FUNCTION sbert.vector_type_v1(type_id oid)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT t.typname::text
      FROM pg_type t
      JOIN pg_depend d ON d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
      JOIN pg_extension x ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid
     WHERE t.oid = $1 AND t.typname IN ('vector', 'halfvec') AND x.extname = 'vector'
$body$;
