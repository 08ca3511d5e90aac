-- Bind a vector column to an encoder and a source: the catalog row and the triggers.
-- Doing it again is allowed, takes no lock, and mends triggers that are missing or disabled; doing it
-- differently is an error, since a column belongs to one encoder for life. The first time, writers are
-- locked out until the transaction ends, so that no change slips between the marks and the triggers.
CREATE FUNCTION sbert.bind_v1(
    relation regclass,
    column_name text,
    declared jsonb,
    source jsonb,
    replaces text DEFAULT NULL,
    mark_pending boolean DEFAULT false
)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v_id integer;
    v_old sbert.embedding_column;
    v_replaces_id integer;
    v_storage text;
    v_keys text[];
    v_sources text[];
BEGIN
    SELECT array_agg(s.name ORDER BY s.position)
      INTO v_sources
      FROM jsonb_array_elements_text(bind_v1.source -> 'columns')
           WITH ORDINALITY AS s (name, position);
    v_storage := sbert.require_bindable_v1(
        bind_v1.relation, bind_v1.column_name, bind_v1.declared, v_sources);
    BEGIN
        PERFORM sbert.prune_v1();
    EXCEPTION WHEN insufficient_privilege THEN
        NULL;  -- What another role has left behind is that role's to remove.
    END;
    IF bind_v1.replaces IS NOT NULL THEN
        SELECT c.id INTO v_replaces_id FROM sbert.embedding_column c
         WHERE c.relation = bind_v1.relation AND c.column_name = bind_v1.replaces;
        IF v_replaces_id IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'SB004',
                MESSAGE = format('column %I of table %s, which %I is to replace, is not bound',
                    bind_v1.replaces, bind_v1.relation::text, bind_v1.column_name),
                HINT = 'Bind the old column first, or leave "replaces" out.';
        END IF;
    END IF;

    SELECT c.* INTO v_old FROM sbert.embedding_column c
     WHERE c.relation = bind_v1.relation AND c.column_name = bind_v1.column_name
       FOR UPDATE;
    IF v_old.id IS NOT NULL THEN
        IF v_old.source <> bind_v1.source
            OR v_old.encoder_name <> (bind_v1.declared ->> 'name')
            OR v_old.dimensions <> (bind_v1.declared ->> 'dimensions')::integer
            OR v_old.replaces_id IS DISTINCT FROM v_replaces_id
        THEN
            RAISE EXCEPTION USING ERRCODE = 'SB002',
                MESSAGE = format('column %I of table %s is bound to encoder "%s" and source %s, '
                    'and cannot be bound to encoder "%s" and source %s',
                    bind_v1.column_name, bind_v1.relation::text, v_old.encoder_name, v_old.source,
                    bind_v1.declared ->> 'name', bind_v1.source),
                HINT = 'A column belongs to one encoder and source for life. Add a column beside it '
                       'that replaces it, or unbind this one with sbert.unbind_v1.';
        END IF;
        v_id := v_old.id;
    ELSE
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', bind_v1.relation);
        v_keys := sbert.key_columns_v1(bind_v1.relation);
        IF v_keys IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = format('table %s has no key by which a row could be named',
                                 bind_v1.relation::text),
                HINT = 'Give it a primary key, or a unique index over NOT NULL columns. Columns of '
                       'the types float, money, interval, timetz, range, array and composite cannot '
                       'be part of it.';
        END IF;
        INSERT INTO sbert.embedding_column AS c
            (relation, column_name, encoder_name, dimensions, declared, source, source_columns,
             key_columns, storage, replaces_id, state)
        VALUES
            (bind_v1.relation, bind_v1.column_name, bind_v1.declared ->> 'name',
             (bind_v1.declared ->> 'dimensions')::integer, bind_v1.declared, bind_v1.source,
             v_sources, v_keys, v_storage, v_replaces_id,
             CASE WHEN v_replaces_id IS NULL THEN 'active' ELSE 'filling' END)
        RETURNING c.id INTO v_id;
    END IF;
    IF (SELECT count(*) FROM pg_trigger t
         WHERE t.tgrelid = bind_v1.relation AND NOT t.tgisinternal AND t.tgenabled <> 'D'
           AND t.tgname LIKE 'sbert\_' || v_id || '\_%') <> 4
    THEN
        PERFORM sbert.install_triggers_v1(v_id);
    END IF;
    IF bind_v1.mark_pending THEN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = 'rows cannot be marked while binding at isolation level '
                    || current_setting('transaction_isolation'),
                HINT = 'Rows that were committed since the transaction began would be missed. Use '
                       'READ COMMITTED.';
        END IF;
        PERFORM sbert.mark_pending_v1(v_id, false);
    END IF;
    RETURN v_id;
END
$body$;
