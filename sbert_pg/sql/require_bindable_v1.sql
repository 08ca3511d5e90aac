-- Say whether a column can be bound, with a reason where it cannot; returns its storage type.
CREATE FUNCTION sbert.require_bindable_v1(
    p_relation regclass, p_column text, p_declared jsonb, p_source jsonb
)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_class pg_class;
    v_type text;
    v_width integer;
    v_name text;
    v_attribute record;
BEGIN
    SELECT * INTO STRICT v_class FROM pg_class WHERE oid = p_relation;
    IF v_class.relkind NOT IN ('r', 'p') OR v_class.relpersistence = 't' THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('relation %s is not a permanent table', p_relation::text),
            HINT = 'Views, foreign tables and temporary tables cannot be kept fresh.';
    END IF;
    IF v_class.relispartition THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('table %s is a partition', p_relation::text),
            HINT = format('Bind the partitioned table, %s; its indexes reach every partition.',
                          pg_partition_root(p_relation)::text);
    END IF;
    IF v_class.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = p_relation) THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('table %s has child tables by inheritance', p_relation::text),
            HINT = 'Indexes of a parent do not hold rows of its children. Bind the children instead, '
                   'or use declarative partitioning.';
    END IF;

    SELECT sbert.vector_type_v1(a.atttypid), a.atttypmod, a.atttypid::regtype::text
      INTO v_type, v_width, v_name
      FROM pg_attribute a
     WHERE a.attrelid = p_relation AND a.attname = p_column AND NOT a.attisdropped;
    IF v_type IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('table %s has no vector column %I', p_relation::text, p_column),
            DETAIL = coalesce(format('The column has type %s.', v_name), 'There is no such column.'),
            HINT = 'Add a column of pgvector''s type vector or halfvec first.';
    END IF;
    IF (p_declared @? 'strict $.name ? (@.type() == "string" && @ != "")'
        AND p_declared @? 'strict $.dimensions ? (@.type() == "number" && @ >= 1 && @ <= 16000
                                           && @ == @.floor())') IS NOT TRUE
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('the encoder of %s.%I is declared as %s, without name or dimensions',
                             p_relation::text, p_column, left(p_declared::text, 200)),
            HINT = 'Pass the declaration as EncoderSpec.to_json() writes it.';
    END IF;
    IF v_width <> -1 AND v_width <> (p_declared ->> 'dimensions')::integer THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('column %I of table %s is %s wide and encoder "%s" gives %s dimensions',
                p_column, p_relation::text, v_width, p_declared ->> 'name',
                p_declared ->> 'dimensions'),
            HINT = 'Declare the encoder''s dimensions, or change the type of the column.';
    END IF;
    IF (jsonb_typeof(p_source -> 'columns') = 'array' AND p_source @? 'strict $.columns[*]'
        AND NOT p_source @? 'strict $.columns[*] ? (@.type() != "string")'
        AND NOT p_source @? 'strict $.keyvalue() ? (@.key == "passages" || @.key == "document").value
                             ? (@.type() != "object")'
        AND NOT p_source @? 'strict $.keyvalue()
                             ? (@.key != "columns" && @.key != "passages" && @.key != "document").value
                             ? (@.type() != "string" && @.type() != "null")') IS NOT TRUE
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('the source of %s.%I names no columns: %s', p_relation::text, p_column,
                             left(coalesce(p_source::text, 'NULL'), 200)),
            HINT = 'Pass the source as Source.to_json() writes it: columns, separator and pattern.';
    END IF;
    FOR v_name IN SELECT jsonb_array_elements_text(p_source -> 'columns') LOOP
        SELECT t.typcategory, a.attgenerated, format_type(a.atttypid, a.atttypmod) AS type
          INTO v_attribute
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
         WHERE a.attrelid = p_relation AND a.attname = v_name AND NOT a.attisdropped
           AND a.attnum > 0;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = format('the source of %s.%I names %I, which the table does not have',
                                 p_relation::text, p_column, v_name),
                HINT = 'Name columns as the database has them.';
        ELSIF v_attribute.typcategory <> 'S' THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = format('column %I, a source of %s.%I, has type %s and not a text type',
                                 v_name, p_relation::text, p_column, v_attribute.type),
                HINT = 'Use a text column, or a stored generated column that makes text of it.';
        ELSIF v_attribute.attgenerated = 'v' THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = format('column %I, a source of %s.%I, is a virtual generated column',
                                 v_name, p_relation::text, p_column),
                HINT = 'No index can hold a virtual column. Make it STORED, or name the columns that '
                       'it is computed from.';
        END IF;
    END LOOP;
    RETURN v_type;
END
$body$;
