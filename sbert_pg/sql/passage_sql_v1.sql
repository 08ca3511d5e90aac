-- The text of a passage as SQL: its heading path and its part of the document, which is found by the
-- foreign key. NULL where the document has changed since it was cut, which the digest tells, or
-- where there is no such key.
CREATE FUNCTION sbert.passage_sql_v1(relation regclass, source jsonb, qualifier text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_document text;
    v_same text;
BEGIN
    SELECT format('%I.%I', n.nspname, k.relname),
           string_agg(format('sbert_d.%I = %s%I', theirs.attname, qualifier, ours.attname), ' AND '
                      ORDER BY part.position)
      INTO v_document, v_same
      FROM pg_constraint c
      JOIN pg_class k ON k.oid = c.confrelid
      JOIN pg_namespace n ON n.oid = k.relnamespace
     CROSS JOIN LATERAL unnest(c.conkey, c.confkey) WITH ORDINALITY AS part (our, their, position)
      JOIN pg_attribute ours ON ours.attrelid = c.conrelid AND ours.attnum = part.our
      JOIN pg_attribute theirs ON theirs.attrelid = c.confrelid AND theirs.attnum = part.their
     WHERE c.conrelid = relation AND c.contype = 'f' AND c.conparentid = 0
     GROUP BY c.oid, n.nspname, k.relname
    HAVING array_agg(ours.attname::text)
           <@ ARRAY(SELECT jsonb_array_elements_text(source -> 'document' -> 'key'))
     LIMIT 1;
    IF v_document IS NULL THEN
        RETURN 'NULL::text';
    END IF;
    RETURN format(
        '(SELECT CASE WHEN substr(encode(sha256(convert_to(sbert_p.text, ''UTF8'')), ''hex''), 1, 32) '
        '= %1$s%2$I THEN sbert_p.text END FROM (SELECT concat_ws(E''\n\n'', nullif(%1$s%3$I, ''''), '
        'substr(coalesce(sbert_d.%4$I, ''''), %1$s%5$I + 1, %1$s%6$I - %1$s%5$I)) AS text FROM %7$s AS sbert_d '
        'WHERE %8$s) AS sbert_p)',
        qualifier, 'digest', 'heading', source -> 'document' ->> 'column', 'start', 'stop',
        v_document, v_same);
END
$body$;
