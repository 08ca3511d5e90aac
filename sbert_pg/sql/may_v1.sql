-- Whether a role may do something with each of these columns of a table, or one of several things that
-- commas divide; false where the table has none of them.
CREATE FUNCTION sbert.may_v1(role_name name, relation regclass, column_names text[], privilege text)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT coalesce(bool_and(has_column_privilege($1, $2, a.attnum, $4)), false)
      FROM pg_attribute a WHERE a.attrelid = $2 AND a.attname = ANY ($3) AND NOT a.attisdropped
$body$;
