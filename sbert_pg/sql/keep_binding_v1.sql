-- Trigger on sbert.binding: what a binding says is for life. Its state may change, its encoder may be
-- filled in once, and names follow a rename; nothing else changes, whoever asks.
CREATE FUNCTION sbert.keep_binding_v1()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
    IF (OLD.encoder_id IS NOT NULL AND OLD.encoder_id IS DISTINCT FROM NEW.encoder_id)
        OR ROW(OLD.id, OLD.relation, OLD.encoder_name, OLD.dimensions, OLD.declared, OLD.storage,
               OLD.null_text, cardinality(OLD.source_columns), cardinality(OLD.key_columns))
           IS DISTINCT FROM
           ROW(NEW.id, NEW.relation, NEW.encoder_name, NEW.dimensions, NEW.declared, NEW.storage,
               NEW.null_text, cardinality(NEW.source_columns), cardinality(NEW.key_columns))
    THEN
        RAISE EXCEPTION USING ERRCODE = 'SB005',
            MESSAGE = format('the binding of %s.%I is for life and cannot be changed',
                             OLD.relation::text, OLD.column_name),
            HINT = 'A change of encoder is a new column beside the old one.';
    END IF;
    RETURN NEW;
END
$body$;
