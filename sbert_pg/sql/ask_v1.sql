-- Leave a question to workers, which hear of it once this is committed. For roles that may read the
-- table; sbert.embed calls it.
CREATE FUNCTION sbert.ask_v1(target text, question text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_id uuid := sbert.asked_v1(target);
BEGIN
    IF question IS NULL OR btrim(question) = '' OR length(question) > 100000 THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = 'a question is a text that is not blank, of at most 100,000 characters';
    END IF;
    -- Whoever answers questions holds this lock for as long as its connection lives.
    IF NOT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                    WHERE l.locktype = 'advisory' AND d.datname = current_database()
                      AND l.classid = 1935827316 AND l.objid = 1902467956 AND l.objsubid = 2)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = 'no worker answers questions on this database',
            HINT = 'Run ''sbert-pg worker'', connected to the server directly and not through a '
                   'pooler in transaction mode.';
    END IF;
    INSERT INTO sbert.question AS q (binding_id, role, digest, question)
    VALUES (v_id, sbert.caller_v1(), sha256(convert_to(ask_v1.question, 'UTF8')), ask_v1.question)
    ON CONFLICT ON CONSTRAINT question_pkey DO UPDATE SET asked_at = now(), error = NULL;
    PERFORM pg_notify('sbert_question', '');
END
$body$;
