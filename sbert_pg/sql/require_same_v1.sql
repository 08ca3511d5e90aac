-- Refuse to bind a bound column to something else.
CREATE FUNCTION sbert.require_same_v1(
    binding_id uuid, declared jsonb, source jsonb, replaces_id uuid
)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    v sbert.binding;
BEGIN
    SELECT b.* INTO STRICT v FROM sbert.binding b WHERE b.id = require_same_v1.binding_id;
    IF v.source <> require_same_v1.source
        OR v.encoder_name <> (require_same_v1.declared ->> 'name')
        OR v.dimensions <> (require_same_v1.declared ->> 'dimensions')::integer
        OR v.replaces_id IS DISTINCT FROM require_same_v1.replaces_id
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB002',
            MESSAGE = format('column %I of table %s is bound to encoder "%s" and source %s, '
                'and cannot be bound to encoder "%s" and source %s',
                v.column_name, v.relation::text, v.encoder_name, v.source,
                require_same_v1.declared ->> 'name', require_same_v1.source),
            HINT = 'A column belongs to one encoder and source for life. Add a column beside it '
                   'that replaces it, or unbind this one with sbert.unbind_v1. Columns that were '
                   'renamed are followed by sbert.rename_v1.';
    END IF;
END
$body$;
