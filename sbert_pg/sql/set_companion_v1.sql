-- Give a bound column its companion, if it lacks one. The default is set after the column is added,
-- so rows that are there have NULL, which is a backfill's, and new ones the nil uuid: pending.
CREATE FUNCTION sbert.set_companion_v1(binding_id uuid)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
    v_table text;
    v_type oid;
BEGIN
    SELECT b.* INTO STRICT v FROM sbert.binding b WHERE b.id = binding_id;
    v_table := sbert.name_v1(v.relation);
    SELECT a.atttypid INTO v_type
      FROM pg_attribute a
     WHERE a.attrelid = v.relation AND a.attname = v.companion AND NOT a.attisdropped;
    IF v_type IS NULL THEN
        EXECUTE format('ALTER TABLE %s ADD COLUMN %I uuid', v_table, v.companion);
    ELSIF v_type <> 'uuid'::regtype THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('column %I of table %s has type %s; it has to be a uuid, since it '
                'stands beside the embedding column %I', v.companion, v_table,
                v_type::regtype::text, v.column_name),
            HINT = 'Rename the embedding column, or the other one.';
    END IF;
    IF sbert.lacks_default_v1(v.relation, v.companion) THEN
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET DEFAULT %L::uuid', v_table, v.companion,
                       '00000000-0000-0000-0000-000000000000');
    END IF;
END
$body$;
