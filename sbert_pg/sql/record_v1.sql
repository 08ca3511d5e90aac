-- Write what bind_v1 binds into the catalog, or compare it with what is there; only for the owner of
-- the table. Returns the identity of the binding.
CREATE FUNCTION sbert.record_v1(
    relation regclass, column_name text, declared jsonb, source jsonb, replaces text
)
RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_old sbert.binding;
    v_replaces_id uuid;
    v_begun text;
    v_sources text[];
    v_storage text;
    v_keys text[];
    v_id uuid;
BEGIN
    PERFORM sbert.require_owner_v1(record_v1.relation);
    v_storage := sbert.require_bindable_v1(
        record_v1.relation, record_v1.column_name, record_v1.declared, record_v1.source);
    v_sources := ARRAY(SELECT jsonb_array_elements_text(record_v1.source -> 'columns'));
    PERFORM sbert.prune_v1();
    IF record_v1.replaces IS NOT NULL THEN
        SELECT b.id INTO v_replaces_id FROM sbert.binding b
         WHERE b.relation = record_v1.relation AND b.column_name = record_v1.replaces;
        IF v_replaces_id IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'SB004',
                MESSAGE = format('column %I of table %s, which %I is to replace, is not bound',
                    record_v1.replaces, record_v1.relation::text, record_v1.column_name),
                HINT = 'Bind the old column first, or leave "replaces" out.';
        END IF;
    END IF;
    PERFORM sbert.follow_rename_v1(record_v1.relation, record_v1.column_name, v_sources);
    SELECT b.* INTO v_old FROM sbert.binding b
     WHERE b.relation = record_v1.relation AND b.column_name = record_v1.column_name FOR UPDATE;
    IF v_old.id IS NOT NULL THEN
        PERFORM sbert.require_same_v1(v_old.id, record_v1.declared, record_v1.source, v_replaces_id);
        UPDATE sbert.binding AS b SET bound_name = sbert.name_v1(b.relation) WHERE b.id = v_old.id;
        RETURN v_old.id;
    END IF;
    -- One change at a time: where the old column is itself the new one of a change, giving that up
    -- would leave this one without a beginning.
    IF EXISTS (SELECT FROM sbert.binding b WHERE b.id = v_replaces_id AND b.replaces_id IS NOT NULL) THEN
        RAISE EXCEPTION USING ERRCODE = 'SB002',
            MESSAGE = format('column %I of table %s, which %I is to replace, is itself the new column of '
                'a change', record_v1.replaces, record_v1.relation::text, record_v1.column_name),
            HINT = 'Finish that change or abort it before another one begins.';
    END IF;
    SELECT b.column_name INTO v_begun FROM sbert.binding b WHERE b.replaces_id = v_replaces_id;
    IF v_begun IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB002',
            MESSAGE = format('column %I of table %s is being replaced by column %I already',
                record_v1.replaces, record_v1.relation::text, v_begun),
            HINT = 'Finish that change or abort it before another one begins.';
    END IF;
    PERFORM sbert.require_free_name_v1(record_v1.relation, record_v1.column_name);
    v_keys := sbert.key_columns_v1(record_v1.relation);
    IF v_keys IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('table %s has no key by which a row could be named',
                             record_v1.relation::text),
            DETAIL = coalesce(
                (SELECT format('Its primary key is made of %s.',
                               string_agg(format('%I (%s)', a.attname, a.atttypid::regtype), ', '))
                   FROM pg_index i JOIN pg_attribute a
                     ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
                  WHERE i.indrelid = record_v1.relation AND i.indisprimary), 'It has no primary key.'),
            HINT = 'Give it a primary key, or a unique index over NOT NULL columns. Columns of the '
                   'types float, money, array and composite cannot be part of it.';
    END IF;
    INSERT INTO sbert.binding AS b
        (relation, bound_name, column_name, companion, encoder_name, dimensions, declared, source,
         source_columns, key_columns, null_text, storage, replaces_id, state)
    SELECT record_v1.relation, sbert.name_v1(record_v1.relation), record_v1.column_name,
           sbert.companion_v1(record_v1.column_name), record_v1.declared ->> 'name',
           (record_v1.declared ->> 'dimensions')::integer, record_v1.declared, record_v1.source,
           v_sources, v_keys, NOT a.attnotnull, v_storage, v_replaces_id,
           CASE WHEN v_replaces_id IS NULL THEN 'active' ELSE 'filling' END
      FROM pg_attribute a
     WHERE a.attrelid = record_v1.relation AND a.attname = record_v1.column_name
    RETURNING b.id INTO v_id;
    RETURN v_id;
END
$body$;
