-- Name of the column that stands beside an embedding column; sbert_pg.source has the same rule.
CREATE FUNCTION sbert.companion_v1(column_name text)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT CASE WHEN octet_length(convert_to($1, 'UTF8')) <= 60 THEN $1 || '_of'
                ELSE 'of_' || left(encode(sha256(convert_to($1, 'UTF8')), 'hex'), 16) END
$body$;
