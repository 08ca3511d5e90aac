-- The half of a digest that names a text, as SQL over a text. The bytes are those of the text in the
-- server's encoding; convert_to() would not be immutable. A backslash is written as chr(92), since
-- pg8000 takes the end of E'\\' for an escaped quote, and reads on for the end of the literal.
CREATE FUNCTION sbert.of_sql_v1(binding_id uuid, value text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT format('substr(encode(sha256(replace((%L::text || (%s)) COLLATE "C", chr(92), repeat(chr(92), 2))'
                  '::bytea), ''hex''), 1, 16)', $1, $2)
$body$;
