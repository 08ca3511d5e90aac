-- Trigger on sbert.embedding_column: what a binding says is for life. Its state may change, its
-- encoder may be filled in once; names follow a rename through sbert.rename_v1, and a binding ends
-- through sbert.unbind_v1.
CREATE FUNCTION sbert.keep_binding_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF current_setting('sbert.maintenance', true) = 'on' THEN
        IF TG_OP = 'DELETE' THEN
            RETURN OLD;
        END IF;
        RETURN NEW;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION USING ERRCODE = 'SB005',
            MESSAGE = format('the binding of %s.%I cannot be deleted by hand',
                             OLD.relation::text, OLD.column_name),
            HINT = 'Use sbert.unbind_v1, which takes the triggers away as well.';
    END IF;
    IF (OLD.encoder_id IS NOT NULL AND OLD.encoder_id IS DISTINCT FROM NEW.encoder_id)
        OR ROW(OLD.id, OLD.relation, OLD.column_name, OLD.encoder_name, OLD.dimensions, OLD.declared,
               OLD.source, OLD.source_columns, OLD.key_columns, OLD.replaces_id)
           IS DISTINCT FROM
           ROW(NEW.id, NEW.relation, NEW.column_name, NEW.encoder_name, NEW.dimensions, NEW.declared,
               NEW.source, NEW.source_columns, NEW.key_columns, NEW.replaces_id)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB005',
            MESSAGE = format('the binding of %s.%I is for life and cannot be changed',
                             OLD.relation::text, OLD.column_name),
            HINT = 'A change of encoder is a new column beside the old one.';
    END IF;
    RETURN NEW;
END
$body$;
