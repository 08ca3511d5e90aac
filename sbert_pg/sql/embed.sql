-- The vector of a question, as text, for callers without Python: a worker makes it, or it is known.
-- A procedure, since the question has to be committed before a worker can see it; so it cannot be
-- called inside BEGIN, but for known questions. It runs by the caller's rights and path, since one
-- that sets them cannot commit: each name here has its schema.
CREATE PROCEDURE sbert.embed(
    target text, question text, INOUT embedding text, seconds double precision DEFAULT 10
)
LANGUAGE plpgsql
AS $body$
DECLARE
    v_until timestamptz := pg_catalog.clock_timestamp()
        OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => seconds);
    v_reason text;
BEGIN
    embedding := sbert.known_v1(target, question);
    IF embedding IS NOT NULL THEN
        RETURN;
    END IF;
    -- Whether there can be a COMMIT is said by its error alone, in the server's language. In a block
    -- that catches there is none for a reason of its own, unless there can be none at all, as within
    -- a DO that EXECUTE runs.
    BEGIN
        COMMIT;
    EXCEPTION WHEN invalid_transaction_termination THEN
        v_reason := SQLERRM;
    END;
    BEGIN
        EXECUTE 'DO LANGUAGE plpgsql $do$ BEGIN COMMIT; END $do$';
    EXCEPTION
        WHEN invalid_transaction_termination THEN
            IF v_reason OPERATOR(pg_catalog.=) SQLERRM THEN
                RAISE EXCEPTION USING ERRCODE = '2D000',
                    MESSAGE = 'sbert.embed cannot ask a worker inside BEGIN or a function',
                    DETAIL = 'A worker sees a question once it is committed.',
                    HINT = 'Call it before BEGIN; inside, sbert.known_v1 has its answer.';
            END IF;
        WHEN insufficient_privilege THEN NULL;  -- No DO for this role: PostgreSQL's words, then.
    END;
    -- A question is lost with the server that crashes, and is asked again: no wait for the disk.
    PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    PERFORM sbert.ask_v1(target, question);
    COMMIT;
    LOOP
        embedding := sbert.known_v1(target, question);
        IF embedding IS NOT NULL THEN
            RETURN;
        END IF;
        IF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>) v_until THEN
            RAISE EXCEPTION USING ERRCODE = 'SB003',
                MESSAGE = pg_catalog.format('no worker has answered within %s seconds', seconds),
                HINT = 'The log of sbert-pg worker says whether it has the encoder of this column.';
        END IF;
        PERFORM pg_catalog.pg_sleep(0.001);
        -- Each look sees what is committed now, at every isolation level, and holds nothing back.
        COMMIT;
    END LOOP;
END
$body$;
