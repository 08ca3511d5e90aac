-- Whether a name of a binding means another column than when the queue's index was made.
CREATE FUNCTION sbert.is_another_v1(binding_id uuid)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    WITH made_of AS (SELECT c AS attnum FROM sbert.queue_columns_v1($1) AS c),
    meant AS (
        SELECT a.attnum::integer AS attnum FROM sbert.binding b JOIN pg_attribute a
            ON a.attrelid = b.relation AND NOT a.attisdropped
           AND a.attname = ANY (ARRAY[b.column_name, b.companion] || b.source_columns || b.key_columns)
         WHERE b.id = $1
    )
    SELECT EXISTS (SELECT FROM made_of)
       AND EXISTS ((TABLE made_of EXCEPT TABLE meant) UNION ALL (TABLE meant EXCEPT TABLE made_of))
$body$;
