-- The vector of a question that this role has asked before, as text; NULL where there is none yet.
-- An answer that was an error is raised. For roles that may read the table.
CREATE FUNCTION sbert.known_v1(target text, question text)
RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v_answer record;
BEGIN
    SELECT q.vector, q.error INTO v_answer FROM sbert.question q
     WHERE q.binding_id = sbert.asked_v1(target) AND q.role = sbert.caller_v1()
       AND q.digest = sha256(convert_to(known_v1.question, 'UTF8'));
    IF v_answer.error IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('the question cannot be embedded: %s', v_answer.error);
    END IF;
    RETURN v_answer.vector;
END
$body$;
