-- Numbers of the columns that the queue's index of a binding is made of: what its names meant when it
-- was made, whatever they mean now.
CREATE FUNCTION sbert.queue_columns_v1(binding_id uuid)
RETURNS SETOF integer
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT DISTINCT d.refobjsubid
      FROM sbert.queue_ddl_v1($1) q
      JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = q.existing
                      AND d.refclassid = 'pg_class'::regclass
      JOIN sbert.binding b ON b.id = $1 AND d.refobjid = b.relation
     WHERE q.kind = 'queue' AND d.refobjsubid > 0
$body$;
