-- A source whose column has another name now. In a template a doubled brace stands for itself, so the
-- pattern is taken apart and not searched by a regular expression made of a name.
CREATE FUNCTION sbert.renamed_source_v1(source jsonb, old_name text, new_name text)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT jsonb_set(
        jsonb_set($1, '{columns}', (
            SELECT jsonb_agg(CASE WHEN c.name = $2 THEN $3 ELSE c.name END ORDER BY c.position)
              FROM jsonb_array_elements_text($1 -> 'columns') WITH ORDINALITY AS c (name, position))),
        '{pattern}', coalesce(to_jsonb((
            SELECT string_agg(CASE WHEN p.part = '{' || $2 || '}' THEN '{' || $3 || '}'
                                   ELSE p.part END, '' ORDER BY p.position)
              FROM (SELECT m.part[1] AS part, m.position
                      FROM regexp_matches($1 ->> 'pattern', '[{][{]|[}][}]|[{][^{}]*[}]|[^{}]+', 'g')
                           WITH ORDINALITY AS m (part, position)) AS p)), 'null'::jsonb))
$body$;
