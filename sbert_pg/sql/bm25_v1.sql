-- Rows that match a question by their words, ranked by BM25: what matching() of the library does, for
-- callers without it. The row type says which table:
--   SELECT (matched).id, (matched).title, score
--     FROM sbert.bm25_v1(NULL::article, 'search', 'laser "both sides" -toner');
-- column_name is a tsvector, as text_column() makes it. row_filter is SQL about the row d. language is the
-- column's own by default, and of rows with their own only those of it are found; weights are those
-- of the classes A to D. It runs with the caller's rights and search path, and its numbers come from
-- ANALYZE where there are any; else, and for rare words, they are counted.
CREATE FUNCTION sbert.bm25_v1(
    row_type anyelement,
    column_name name,
    question text,
    row_limit integer DEFAULT 10,
    row_filter text DEFAULT 'true',
    language regconfig DEFAULT NULL,
    weights float8[] DEFAULT NULL
)
RETURNS TABLE (matched anyelement, score float8)
LANGUAGE plpgsql STABLE
AS $body$
DECLARE
    v_relation regclass;
    v_schema name;
    v_name name;
    v_parts boolean;
    v_pages float8;
    -- The number of positions: what rank normalisation 2 divides by is 1e-20 where two words are both
    -- asked for and not there, as words with blanks never are.
    v_length text := 'coalesce(round(1e-20::float4::float8 '
                     '/ nullif(ts_rank(%s, $q$''a b'' & ''c d''$q$::tsquery, 2), 0)), 0)';
    v_keys text;
    v_words text;
    v_required tsquery;
    v_rows float8;
    v_table_rows float8;
    v_mean float8;
    v_terms text[];
    v_df float8[];
    v_idf float8[];
    v_counted bigint;
    v_common boolean[];
    v_levels float8[];
    v_tf text;
    v_vectors text;
    v_select text;
    v_order text;
    v_rekeyed text;
    v_speaks text;
    v_own text := 'true';
    v_share float8 := 1;
    v_sampled float8 := 16;
BEGIN
    -- What ANALYZE kept of a table says nothing of those that inherit from it.
    SELECT k.oid, n.nspname, whole.name, k.relkind = 'p', leaves.pages,
           CASE WHEN leaves.rows > 0 AND NOT row_security_active(k.oid)
                 AND whole.name IS NOT NULL THEN leaves.rows END,
           primary_key.inner_order, primary_key.outer_order
      INTO v_relation, v_schema, v_name, v_parts, v_pages, v_rows, v_keys, v_rekeyed
      FROM pg_catalog.pg_type t
      JOIN pg_catalog.pg_class k ON k.oid = t.typrelid
      JOIN pg_catalog.pg_namespace n ON n.oid = k.relnamespace
     CROSS JOIN LATERAL (
           SELECT CASE WHEN k.relkind <> 'r' OR NOT k.relhassubclass THEN k.relname END AS name) AS whole
     CROSS JOIN LATERAL (
           SELECT CASE WHEN min(leaf.reltuples) >= 0 THEN sum(leaf.reltuples::float8) END AS rows,
                  greatest(sum(leaf.relpages), 1) AS pages
             FROM pg_catalog.pg_class leaf
            WHERE leaf.oid = k.oid AND k.relkind <> 'p' OR k.relkind = 'p' AND leaf.oid = ANY (
                  ARRAY(SELECT tree.relid FROM pg_catalog.pg_partition_tree(k.oid) tree WHERE tree.isleaf))
           ) AS leaves
     CROSS JOIN LATERAL (
           SELECT string_agg(format('d.%I', a.attname), ', ' ORDER BY c.place) AS inner_order,
                  string_agg(format('(d).%I', a.attname), ', ' ORDER BY c.place) AS outer_order
             FROM pg_catalog.pg_index i
            CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS c (number, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = c.number
            WHERE i.indrelid = k.oid AND i.indisprimary) AS primary_key
     WHERE t.oid = pg_typeof(row_type);
    IF v_keys IS NULL OR NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = v_relation AND NOT a.attisdropped
           AND a.attname = column_name AND a.atttypid = 'tsvector'::regtype)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB003',
            MESSAGE = format('%s has no text column %I, or no primary key', pg_typeof(row_type), column_name),
            HINT = 'Give the row type of a table, as in NULL::article, and a column that '
                   'text_column() has made.';
    END IF;
    -- The column that says each row's language, in quotes where it needs them; or the language.
    SELECT substring(made FROM 'to_tsvector\(("(?:[^"]|"")+"|\w+), '),
           coalesce(language, substring(made FROM 'to_tsvector\(''([^'']+)''::regconfig')::regconfig,
                    get_current_ts_config())
      INTO v_speaks, language
      FROM pg_catalog.pg_attribute a
      LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     CROSS JOIN LATERAL pg_get_expr(d.adbin, d.adrelid) AS made
     WHERE a.attrelid = v_relation AND a.attname = column_name;
    IF v_speaks IS NOT NULL THEN
        v_own := format('d.%s = %L::regconfig', v_speaks, language);
        v_sampled := 160;
        v_share := NULL;
        row_filter := format('(%s) AND %s', row_filter, v_own);
    END IF;

    -- Quoted phrases and words behind a minus are required, or excluded; the words of phrases score.
    -- Two dashes are none: --word is a word.
    SELECT concat_ws(' ', string_agg(p[2], ' ') FILTER (WHERE length(p[1]) % 2 = 0)),
           websearch_to_tsquery(language, coalesce(
               string_agg(format('%s"%s"', left(p[1], length(p[1]) % 2), p[2]), ' '), ''))
      INTO v_words, v_required
      FROM regexp_matches(question, '(-*)"([^"]*)"?', 'g') AS p;
    SELECT concat_ws(' ', string_agg(w, ' ') FILTER (WHERE w !~ '^-(--)*[^-]'), v_words),
           v_required && websearch_to_tsquery(language, coalesce(
               string_agg(format('-"%s"', ltrim(w, '-')), ' ') FILTER (WHERE w ~ '^-(--)*[^-]'), ''))
      INTO v_words, v_required
      FROM regexp_split_to_table(regexp_replace(question, '-*"[^"]*"?', ' ', 'g'), '\s+') AS w;

    -- Of rows with their own language a sample says how many are of the question's. The mean length is
    -- that of each so-manieth row of the sample.
    v_table_rows := v_rows;
    v_sampled := least(1, v_sampled / v_pages);
    IF v_rows IS NOT NULL AND v_speaks IS NOT NULL THEN
        EXECUTE format('SELECT nullif(avg(coalesce(%s, false)::integer)::float8, 0) FROM %s AS d '
                       'TABLESAMPLE system (100 * $1) REPEATABLE (0)', v_own, v_relation)
           INTO v_share USING v_sampled;
        v_rows := v_rows * v_share;
    END IF;
    IF v_rows IS NOT NULL THEN
        EXECUTE format('SELECT avg(%s) FROM (SELECT d.%I AS vector, %s AS own, row_number() OVER () AS place '
                       'FROM %s AS d TABLESAMPLE system (100 * $1) REPEATABLE (0)) AS r '
                       'WHERE own AND mod(place, greatest(1, floor($2 * $1 / 128))::bigint) = 0',
                       format(v_length, 'r.vector'), column_name, v_own, v_relation)
           INTO v_mean USING v_sampled, v_rows;
    END IF;
    IF v_mean IS NULL THEN
        EXECUTE format('SELECT coalesce($1, count(*)), avg(%s) FROM %s AS d WHERE %s',
                       format(v_length, format('d.%I', column_name)), v_relation, v_own)
           INTO v_rows, v_mean USING v_rows;
    END IF;
    v_mean := coalesce(nullif(v_mean, 0), 1);

    -- What ANALYZE kept is of all rows, and says little of the words of less than half of them.
    SELECT array_agg(a.quoted ORDER BY lexeme COLLATE "C"),
           array_agg(kept.share * coalesce(v_table_rows, v_rows) ORDER BY lexeme COLLATE "C")
      INTO v_terms, v_df
      FROM (SELECT lexeme, concat('''', replace(replace(lexeme, E'\\', E'\\\\'), '''', ''''''), '''') AS quoted
              FROM unnest(to_tsvector(language, v_words))) a
      LEFT JOIN (SELECT u.lexeme, u.share
                   FROM pg_catalog.pg_stats s
                  CROSS JOIN unnest(s.most_common_elems::text::text[], s.most_common_elem_freqs)
                        AS u (lexeme, share)
                  WHERE s.schemaname = v_schema AND s.tablename = v_name AND s.attname = column_name
                    AND s.inherited = v_parts AND v_share >= .5) kept USING (lexeme);
    FOR i IN 1 .. coalesce(cardinality(v_terms), 0) LOOP
        IF v_df[i] IS NULL THEN
            EXECUTE format('SELECT count(*) FROM %s AS d WHERE %s AND d.%I @@ $1',
                           v_relation, v_own, column_name)
               INTO v_counted USING v_terms[i]::tsquery;
            v_df[i] := v_counted;
        END IF;
        v_df[i] := least(v_df[i], v_rows);
        v_idf[i] := ln(1 + (v_rows - v_df[i] + .5) / (v_df[i] + .5));
    END LOOP;

    -- Common are the words behind the rarest, which together are in some hundred rows.
    SELECT array_agg(total > greatest(500, 20 * row_limit) AND total > v_df[i] ORDER BY i)
      INTO v_common
      FROM (SELECT i, sum(v_df[i]) OVER (ORDER BY v_idf[i] DESC, i) AS total
              FROM generate_subscripts(v_terms, 1) AS i) AS totals;

    -- ts_rank of one lexeme grows with tf: half-way between its values for tf - 1 and tf.
    SELECT array_agg(0.1 * (total - 0.5 / (n * n)) / 1.64493406685 ORDER BY n)
      INTO v_levels
      FROM (SELECT n, sum(1.0 / (n * n)) OVER (ORDER BY n)::float8 AS total
              FROM generate_series(1, 255) AS n) levels;
    SELECT coalesce(string_agg(format(
               '%s * width_bucket(ts_rank(''{.1,.1,.1,.1}'', v.%s, t.query)::float8, $4)::float8',
               w.weight, substr('abcd', w.place::int, 1)), ' + '),
               'width_bucket(ts_rank(''{.1,.1,.1,.1}'', v.whole, t.query)::float8, $4)::float8'),
           -- A long vector is stored compressed: it is expanded once for all words. OFFSET 0 keeps
           -- what is computed once from being put in the place of each of its uses.
           concat_ws(', ', format('setweight(d.%I, ''D'') AS whole', column_name),
                     string_agg(format('ts_filter(d.%I, ''{%s}'') AS %2$s', column_name,
                                       substr('abcd', w.place::int, 1)), ', '))
      INTO v_tf, v_vectors FROM unnest(weights) WITH ORDINALITY AS w (weight, place);
    v_select := format(
        'SELECT d, s.score FROM %1$s AS d CROSS JOIN LATERAL (SELECT %6$s OFFSET 0) AS v '
        'CROSS JOIN LATERAL (SELECT %2$s AS length OFFSET 0) AS l CROSS JOIN LATERAL ('
        'SELECT sum(t.idf * c.tf * 2.2 / (c.tf + 1.2 * (0.25 + 0.75 * l.length / $5))) AS score '
        'FROM unnest($1, $2) AS t (query, idf) CROSS JOIN LATERAL (SELECT %3$s AS tf OFFSET 0) AS c) AS s '
        'WHERE (numnode($3) = 0 OR d.%4$I @@ $3) AND (%5$s) AND d.%4$I @@ ',
        v_relation, format(v_length, 'v.whole'), v_tf, column_name, row_filter, v_vectors);
    v_order := format(' ORDER BY s.score DESC, %s LIMIT $6', v_keys);
    -- Rows with the rarest words first; then those with others that can score more than the last.
    RETURN QUERY EXECUTE concat(
        'WITH rare (d, score) AS MATERIALIZED (', v_select, '$7', v_order, '), verdict AS MATERIALIZED ('
        'SELECT least, NOT EXISTS (SELECT FROM unnest($9, $10) AS t (reach, common) '
        'WHERE common AND coalesce(reach > least, true)) AS suffice '
        'FROM (SELECT CASE WHEN count(*) >= $6 THEN min(score) END AS least FROM rare) AS last) '
        'SELECT * FROM (SELECT * FROM rare WHERE (SELECT suffice FROM verdict) UNION ALL (', v_select,
        -- A word alone where it can be enough, else with a lesser one by which it can.
        '(SELECT string_agg(CASE WHEN coalesce(2.2 * t.idf >= least, true) OR cardinality($8) > 24 THEN t.word '
        'ELSE t.word || '' & ('' || (SELECT string_agg(lesser.word, '' | '') '
        'FROM unnest($8, $9) AS lesser (word, reach) WHERE lesser.reach < t.reach '
        'AND 2.2 * t.idf + lesser.reach >= least) || '')'' END, '' | '')::tsquery '
        'FROM unnest($8, $9, $2) AS t (word, reach, idf), verdict WHERE coalesce(t.reach >= least, true)) '
        'AND NOT (SELECT suffice FROM verdict)', v_order,
        ')) AS chosen (d, score) ORDER BY score DESC, ', v_rekeyed)
        USING v_terms::tsquery[], v_idf, v_required, v_levels, v_mean, row_limit,
              (SELECT string_agg(v_terms[i], ' | ') FROM generate_subscripts(v_terms, 1) AS i
                WHERE NOT v_common[i])::tsquery,
              v_terms,
              -- What a row can score at most by a word and those that weigh less.
              (SELECT array_agg(reach ORDER BY i)
                 FROM (SELECT i, 2.2 * sum(v_idf[i]) OVER (ORDER BY v_idf[i], i) AS reach
                         FROM generate_subscripts(v_terms, 1) AS i) AS reaches),
              v_common;
END
$body$;
