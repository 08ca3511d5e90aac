-- The text of a row as SQL over its source columns: total and immutable, so that an index can hold
-- it. Written as sbert_pg.source joins values: empty and missing ones are left out together with
-- their separator; in a template they are nothing. NULL where every column is NULL, unless
-- null_text is false: then ''.
CREATE FUNCTION sbert.text_sql_v1(source jsonb, null_text boolean, qualifier text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_columns text[] := ARRAY(SELECT jsonb_array_elements_text(source -> 'columns'));
    v_separator text := coalesce(source ->> 'separator', '');
    v_pattern text := source ->> 'pattern';
    v_any text;
    v_text text;
    v_literal text := '';
    v_parts text[] := '{}';
    v_match text[];
    -- In a literal, what stands for a backslash; see of_sql_v1.
    v_slashes text := repeat(chr(92), 2);
    v_slash text := ''' || chr(92) || E''';
BEGIN
    SELECT string_agg(format('%s%I IS NOT NULL', qualifier, name), ' OR ' ORDER BY position)
      INTO v_any FROM unnest(v_columns) WITH ORDINALITY AS c (name, position);
    IF v_pattern IS NOT NULL THEN
        -- A doubled brace stands for itself; anything else in braces is a column.
        FOR v_match IN
            SELECT m FROM regexp_matches(v_pattern, '([{][{]|[}][}])|[{]([^{}]*)[}]|([^{}]+)', 'g') AS m
        LOOP
            IF v_match[2] IS NULL THEN
                v_literal := v_literal || coalesce(left(v_match[1], 1), v_match[3]);
            ELSE
                v_parts := v_parts || replace(quote_literal(v_literal), v_slashes, v_slash)
                    || format('coalesce(%s%I::text COLLATE "C", '''')', qualifier, v_match[2]);
                v_literal := '';
            END IF;
        END LOOP;
        v_text := array_to_string(
            v_parts || replace(quote_literal(v_literal), v_slashes, v_slash), ' || ');
    ELSIF cardinality(v_columns) > 1 THEN
        SELECT format('substr(%s, %s)',
                      string_agg(format('coalesce(%s || nullif(%s%I::text COLLATE "C", ''''), '''')',
                                        replace(quote_literal(v_separator), v_slashes, v_slash),
                                        qualifier, name), ' || ' ORDER BY position),
                      length(v_separator) + 1)
          INTO v_text FROM unnest(v_columns) WITH ORDINALITY AS c (name, position);
    ELSE
        v_text := format('%s%I::text', qualifier, v_columns[1]);
        RETURN CASE WHEN null_text THEN v_text ELSE format('coalesce(%s, '''')', v_text) END;
    END IF;
    RETURN format('CASE WHEN %s THEN %s%s END', v_any, v_text,
                  CASE WHEN null_text THEN '' ELSE ' ELSE ''''' END);
END
$body$;
