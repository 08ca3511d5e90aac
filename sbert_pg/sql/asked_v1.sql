-- The binding that a question names, as 'table.column' or 'schema.table.column', each part written as
-- in SQL; a table without a schema is looked for in all. Refuses who may not read the table.
CREATE FUNCTION sbert.asked_v1(target text)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_parts text[] := parse_ident(target);
    v_width integer := cardinality(v_parts);
    v_ids uuid[];
BEGIN
    IF v_width IN (2, 3) THEN
        SELECT array_agg(b.id) INTO v_ids
          FROM sbert.binding b
          JOIN pg_class k ON k.oid = b.relation
          JOIN pg_namespace n ON n.oid = k.relnamespace
         WHERE b.column_name = v_parts[v_width] AND k.relname = v_parts[v_width - 1]
           AND (v_width = 2 OR n.nspname = v_parts[1])
           AND has_any_column_privilege(sbert.caller_v1(), b.relation, 'SELECT')
           AND has_schema_privilege(sbert.caller_v1(), n.oid, 'USAGE');
    END IF;
    IF cardinality(v_ids) = 1 THEN
        RETURN v_ids[1];
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'SB004',
        MESSAGE = CASE WHEN v_ids IS NULL
            THEN format('%L is no embedding column that %I may read', target, sbert.caller_v1())
            ELSE format('%L is the name of several embedding columns', target) END,
        HINT = 'Name it as table.column or schema.table.column; see SELECT * FROM sbert.status.';
END
$body$;
