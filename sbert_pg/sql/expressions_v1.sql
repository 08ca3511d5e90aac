-- What the rows of a bound table say, as SQL; the one place where these expressions are written.
--   text     the text of the row           proof  the half of the digest that proves its vector
--   of_text  the half that names the text  digest what the companion of a fresh row holds
--   stale    whether the row is pending    proven whether its vector is proven, or missing
--   requeue  a digest that makes the row pending and leaves its vector proven
--   failed   whether the row has failed for the text it has
-- Every column is written behind the qualifier, for example 't.'. The binding's identity stands in
-- them as a literal: as a parameter it would hide the index from a generic plan.
CREATE FUNCTION sbert.expressions_v1(binding_id uuid, qualifier text DEFAULT '')
RETURNS TABLE (
    text text, proof text, of_text text, digest text, stale text, proven text, requeue text, failed text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
#variable_conflict use_column
DECLARE
    v sbert.binding;
    v_vector text;
    v_companion text;
    v_text text;
    v_proof text;
    v_of text;
    v_digest text;
    v_something text;
BEGIN
    SELECT b.* INTO v FROM sbert.binding b WHERE b.id = expressions_v1.binding_id;
    IF v.id IS NULL THEN
        RETURN;
    END IF;
    v_vector := format('%s%I', qualifier, v.column_name);
    v_companion := format('%s%I', qualifier, v.companion);
    v_text := sbert.text_sql_v1(v.source, v.null_text, qualifier);
    v_proof := sbert.proof_sql_v1(v.id, v.storage, v.dimensions, v_vector);
    v_of := sbert.of_sql_v1(v.id, v_text);
    v_digest := format('(%s || %s)::uuid', v_proof, v_of);
    -- A row with neither a text nor a vector is fresh, whatever its companion says. Not spelt by IS
    -- NOT NULL: from PostgreSQL 17 on the planner drops that of a column that is NOT NULL from a
    -- query, and then no longer sees that the query asks for the rows of the partial index.
    SELECT format('num_nonnulls(%s, ', v_vector)
           || string_agg(format('%s%I', qualifier, s.name), ', ' ORDER BY s.position) || ') > 0'
      INTO v_something FROM unnest(v.source_columns) WITH ORDINALITY AS s (name, position);
    IF v.source ? 'document' THEN
        -- Rows of passages hold a digest of their text, which stands in their document.
        v_text := sbert.passage_sql_v1(v.relation, v.source, qualifier);
    END IF;
    RETURN QUERY SELECT
        v_text, v_proof, v_of, v_digest,
        format('(%1$s(%2$s IS NULL OR %2$s IS DISTINCT FROM %3$s))',
               CASE WHEN v.null_text THEN format('(%s) AND ', v_something) ELSE '' END,
               v_companion, v_digest),
        sbert.proven_sql_v1(v_vector, v_companion, v_proof),
        format('(%s || ''0000000000000000'')::uuid', v_proof),
        -- In this order, so that fresh and new rows are done with before anything is hashed.
        format('(%1$s IS NULL AND %2$s IS NOT NULL AND %2$s <> %3$L::uuid AND %2$s = %4$s)',
               v_vector, v_companion, '00000000-0000-0000-0000-000000000000', v_digest);
END
$body$;
