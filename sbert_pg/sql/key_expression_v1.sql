-- The text by which a row is named in sbert.pending, as an SQL expression over a record.
-- One key column gives its text, several a JSON array of their texts. The text must not depend on
-- the settings of the session that writes the row, so dates and times go through ISO 8601 in UTC.
CREATE FUNCTION sbert.key_expression_v1(p_relation regclass, p_columns text[], p_record text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_parts text[] := '{}';
    v_name text;
    v_type oid;
    v_field text;
BEGIN
    FOREACH v_name IN ARRAY p_columns LOOP
        SELECT CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
          INTO STRICT v_type
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
         WHERE a.attrelid = p_relation AND a.attname = v_name AND NOT a.attisdropped;
        v_field := format('%s.%I', p_record, v_name);
        v_parts := v_parts || CASE v_type::regtype::text
            WHEN 'date' THEN format('(to_jsonb(%s) #>> ''{}'')', v_field)
            WHEN 'timestamp without time zone' THEN format('(to_jsonb(%s) #>> ''{}'')', v_field)
            WHEN 'timestamp with time zone' THEN format(
                '((to_jsonb(%1$s AT TIME ZONE ''UTC'') #>> ''{}'')'
                || ' || CASE WHEN isfinite(%1$s) THEN ''Z'' ELSE '''' END)', v_field)
            WHEN 'bytea' THEN format('(''\x'' || encode(%s, ''hex''))', v_field)
            ELSE format('(%s)::text', v_field)
        END;
    END LOOP;
    IF cardinality(v_parts) = 1 THEN
        RETURN v_parts[1];
    END IF;
    RETURN format('jsonb_build_array(%s)::text', array_to_string(v_parts, ', '));
END
$body$;
