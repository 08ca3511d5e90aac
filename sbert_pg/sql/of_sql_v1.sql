-- The half of a digest that names a text, as SQL over a text. The bytes are those of the text in the
-- server's encoding; convert_to() would not be immutable.
CREATE FUNCTION sbert.of_sql_v1(binding_id uuid, value text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT format('substr(encode(sha256(replace((%L::text || (%s)) COLLATE "C", %L, %L)::bytea), '
                  '''hex''), 1, 16)', $1, $2, chr(92), repeat(chr(92), 2))
$body$;
