-- Write the trigger functions of one binding and put its triggers on the table.
--
-- The functions are written for the table, since reading a column whose name is only known at run
-- time costs a dynamic statement per row. They run with the rights of the role that bound the
-- column, and with a fixed search path, so whoever writes the table needs no right on this schema.
-- "=" on vectors is called by its schema: IS DISTINCT FROM would be dumped without one, and a dump
-- could not be restored.
CREATE FUNCTION sbert.install_triggers_v1(p_column_id integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.embedding_column;
    v_partitioned boolean;
    v_table text;
    v_old_key text;
    v_new_key text;
    v_key_changed text;
    v_source_changed text;
    v_no_text text;
    v_vector_changed text;
    -- Long values lie in a table of their own, and an update that leaves one alone leaves its number
    -- alone. Looking at the number first spares reading both (from PostgreSQL 17 on).
    v_moved_or_short constant text := CASE
        WHEN current_setting('server_version_num')::integer >= 170000 THEN
            '(pg_column_toast_chunk_id(NEW.%1$I) IS NULL OR pg_column_toast_chunk_id(OLD.%1$I) '
            'IS DISTINCT FROM pg_column_toast_chunk_id(NEW.%1$I)) AND '
        ELSE '' END;
    v_attested text;
    v_verified text;
    v_remark constant text :=
        'ON CONFLICT (column_id, key) DO UPDATE SET version = excluded.version, lease_until = NULL, '
        'claimed_by = NULL, attempts = 0, next_attempt_at = NULL, failed = false, '
        'skipped = false, error = NULL';
    v_notify text;
    v_send text;
    v_function text;
BEGIN
    SELECT * INTO STRICT v FROM sbert.embedding_column WHERE id = p_column_id;
    PERFORM sbert.remove_triggers_v1(p_column_id);
    SELECT k.relkind = 'p', format('%I.%I', n.nspname, k.relname)
      INTO STRICT v_partitioned, v_table
      FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace
     WHERE k.oid = v.relation;

    SELECT format('(' || v_moved_or_short || '((OLD.%1$I IS NULL) <> (NEW.%1$I IS NULL) OR '
                  'OLD.%1$I OPERATOR(%2$I.<>) NEW.%1$I))', v.column_name, n.nspname),
           format('%I.%I', n.nspname, t.typname || '_send')
      INTO STRICT v_vector_changed, v_send
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_namespace n ON n.oid = t.typnamespace
     WHERE a.attrelid = v.relation AND a.attname = v.column_name;

    v_old_key := sbert.key_expression_v1(v.relation, v.key_columns, 'OLD');
    v_new_key := sbert.key_expression_v1(v.relation, v.key_columns, 'NEW');
    -- Key types outside pg_catalog are compared by their text, for the sake of dumps.
    SELECT string_agg(
               CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace
                    THEN format('OLD.%1$I IS DISTINCT FROM NEW.%1$I', k.name)
                    ELSE format('(OLD.%1$I)::text IS DISTINCT FROM (NEW.%1$I)::text', k.name) END,
               ' OR ' ORDER BY k.position)
      INTO STRICT v_key_changed
      FROM unnest(v.key_columns) WITH ORDINALITY AS k (name, position)
      JOIN pg_attribute a ON a.attrelid = v.relation AND a.attname = k.name
      JOIN pg_type t ON t.oid = a.atttypid;
    -- Compared byte by byte: a collation or type that ignores case must not hide a change.
    SELECT string_agg(format('(' || v_moved_or_short || '(OLD.%1$I)::text COLLATE "C" IS DISTINCT '
                             'FROM (NEW.%1$I)::text COLLATE "C")', s.name),
                      ' OR ' ORDER BY s.position),
           string_agg(format('NEW.%I IS NULL', s.name), ' AND ' ORDER BY s.position)
      INTO STRICT v_source_changed, v_no_text
      FROM unnest(v.source_columns) WITH ORDINALITY AS s (name, position);

    v_attested := format('coalesce(strpos(current_setting(''sbert.attested'', true), %L) > 0, false)',
                         ',' || v.id || ',');
    v_verified := format('coalesce(strpos(current_setting(''sbert.verified'', true), %L) > 0, false)',
                         ',' || v.id || ',');
    v_notify := format(
        'IF current_setting(''sbert.notify'', true) IS DISTINCT FROM ''off'' THEN '
        'PERFORM pg_notify(''sbert_pending'', %L); END IF;', v.id::text);

    -- INSERT
    v_function := format('sbert.%I', 'inserted_' || v.id);
    IF v_partitioned THEN
        -- A row that moves to another partition is deleted there and inserted here; the row trigger
        -- for DELETE, which runs directly before, has left word of what it was.
        EXECUTE format(
            $function$
            CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS $trigger$
            DECLARE
                v_moved text := coalesce(current_setting('sbert.moved_%2$s', true), '');
                v_same_vector boolean := false;
                v_same_source boolean := false;
            BEGIN
                IF v_moved <> '' THEN
                    v_same_vector := NEW.%3$I IS NOT NULL
                        AND split_part(v_moved, ' ', 1) = encode(sha256(%4$s(NEW.%3$I)), 'hex');
                    v_same_source := split_part(v_moved, ' ', 2) = encode(sha256(convert_to(ROW(%5$s)::text, 'UTF8')), 'hex');
                END IF;
                IF NEW.%3$I IS NOT NULL AND NOT v_same_vector AND NOT %6$s THEN
                    PERFORM sbert.refuse_v1(%2$s);
                END IF;
                IF (NEW.%3$I IS NULL) <> (%7$s)
                    OR v_same_vector AND (NOT v_same_source OR split_part(v_moved, ' ', 3) = 'true')
                    OR v_same_source AND NEW.%3$I IS NOT NULL AND NOT v_same_vector AND NOT %8$s
                THEN
                    INSERT INTO sbert.pending AS p (column_id, key) VALUES (%2$s, %9$s)
                    %10$s;
                    %11$s
                END IF;
                RETURN NULL;
            END $trigger$
            $function$,
            v_function, v.id, v.column_name, v_send,
            (SELECT string_agg(format('NEW.%I', name), ', ') FROM unnest(v.source_columns) AS name),
            v_attested, v_no_text, v_verified, v_new_key, v_remark, v_notify);
        EXECUTE format(
            'CREATE TRIGGER %I AFTER INSERT ON %s FOR EACH ROW '
            'WHEN (NOT %s OR (NEW.%I IS NULL) <> (%s)) EXECUTE FUNCTION %s()',
            'sbert_' || v.id || '_insert', v_table, v_verified, v.column_name, v_no_text, v_function);
    ELSE
        EXECUTE format(
            $function$
            CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS $trigger$
            BEGIN
                IF NOT %2$s AND EXISTS (SELECT FROM inserted AS r WHERE r.%3$I IS NOT NULL) THEN
                    PERFORM sbert.refuse_v1(%4$s);
                END IF;
                INSERT INTO sbert.pending AS p (column_id, key)
                SELECT %4$s, %5$s FROM inserted AS r WHERE (r.%3$I IS NULL) <> (%6$s)
                %7$s;
                IF FOUND THEN
                    %8$s
                END IF;
                RETURN NULL;
            END $trigger$
            $function$,
            v_function, v_attested, v.column_name, v.id,
            sbert.key_expression_v1(v.relation, v.key_columns, 'r'),
            (SELECT string_agg(format('r.%I IS NULL', name), ' AND ')
               FROM unnest(v.source_columns) AS name),
            v_remark, v_notify);
        EXECUTE format(
            'CREATE TRIGGER %I AFTER INSERT ON %s REFERENCING NEW TABLE AS inserted '
            'FOR EACH STATEMENT EXECUTE FUNCTION %s()',
            'sbert_' || v.id || '_insert', v_table, v_function);
    END IF;
    EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', v_function);

    -- UPDATE. A vector that is written without its text may have been made from an older text, so
    -- the row is marked, unless the writer has vouched for having held the row while comparing.
    v_function := format('sbert.%I', 'updated_' || v.id);
    EXECUTE format(
        $function$
        CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp AS $trigger$
        DECLARE
            v_vector_changed boolean := coalesce(%2$s, false);
            v_source_changed boolean := %3$s;
            v_key_changed boolean := %4$s;
            v_no_text boolean := %5$s;
            v_marked boolean := false;
            v_fresh boolean;
        BEGIN
            IF v_vector_changed AND NEW.%6$I IS NOT NULL AND NOT %7$s THEN
                PERFORM sbert.refuse_v1(%8$s);
            END IF;
            IF v_key_changed THEN
                DELETE FROM sbert.pending AS p WHERE p.column_id = %8$s AND p.key = %9$s;
                v_marked := FOUND;
            END IF;
            IF v_vector_changed AND %10$s THEN
                -- Who holds the row leaves its text alone. If that changes in the same statement, a
                -- BEFORE trigger has rewritten it, and the vector is that of the text before.
                v_fresh := NOT v_source_changed;
            ELSIF v_source_changed OR v_vector_changed THEN
                v_fresh := (NEW.%6$I IS NULL AND v_no_text)
                    OR (v_source_changed AND v_vector_changed
                        AND NEW.%6$I IS NOT NULL AND NOT v_no_text);
            ELSE
                v_fresh := NOT v_marked;
            END IF;
            IF v_fresh THEN
                IF v_source_changed OR v_vector_changed THEN
                    DELETE FROM sbert.pending AS p WHERE p.column_id = %8$s AND p.key = %11$s;
                END IF;
                RETURN NULL;
            END IF;
            INSERT INTO sbert.pending AS p (column_id, key) VALUES (%8$s, %11$s)
            %12$s;
            %13$s
            RETURN NULL;
        END $trigger$
        $function$,
        v_function, v_vector_changed, v_source_changed, v_key_changed, v_no_text, v.column_name,
        v_attested, v.id, v_old_key, v_verified, v_new_key, v_remark, v_notify);
    EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', v_function);
    EXECUTE format(
        'CREATE TRIGGER %I AFTER UPDATE ON %s FOR EACH ROW '
        'WHEN (%s OR %s OR (NOT (%s AND %s) AND %s)) EXECUTE FUNCTION %s()',
        'sbert_' || v.id || '_update', v_table, v_key_changed, v_source_changed, v_verified,
        v_attested, v_vector_changed, v_function);

    -- DELETE, row by row: as fast as by statement for many rows, and a join of the deleted rows with a
    -- long queue of marks is planned badly for one.
    v_function := format('sbert.%I', 'deleted_' || v.id);
    IF v_partitioned THEN
        EXECUTE format(
            $function$
            CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS $trigger$
            BEGIN
                DELETE FROM sbert.pending AS p WHERE p.column_id = %2$s AND p.key = %3$s;
                PERFORM set_config('sbert.moved_%2$s', concat_ws(' ',
                    coalesce(encode(sha256(%4$s(OLD.%5$I)), 'hex'), '-'),
                    encode(sha256(convert_to(ROW(%6$s)::text, 'UTF8')), 'hex'), FOUND::text), true);
                RETURN NULL;
            END $trigger$
            $function$,
            v_function, v.id, v_old_key, v_send, v.column_name,
            (SELECT string_agg(format('OLD.%I', name), ', ') FROM unnest(v.source_columns) AS name));
    ELSE
        EXECUTE format(
            $function$
            CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS $trigger$
            BEGIN
                DELETE FROM sbert.pending AS p WHERE p.column_id = %2$s AND p.key = %3$s;
                RETURN NULL;
            END $trigger$
            $function$, v_function, v.id, v_old_key);
    END IF;
    EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', v_function);
    EXECUTE format(
        'CREATE TRIGGER %I AFTER DELETE ON %s FOR EACH ROW EXECUTE FUNCTION %s()',
        'sbert_' || v.id || '_delete', v_table, v_function);

    -- TRUNCATE
    v_function := format('sbert.%I', 'truncated_' || v.id);
    EXECUTE format(
        $function$
        CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp AS $trigger$
        BEGIN
            DELETE FROM sbert.pending AS p WHERE p.column_id = %2$s;
            RETURN NULL;
        END $trigger$
        $function$, v_function, v.id);
    EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', v_function);
    EXECUTE format(
        'CREATE TRIGGER %I AFTER TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION %s()',
        'sbert_' || v.id || '_truncate', v_table, v_function);
END
$body$;
