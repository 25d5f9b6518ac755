"""The trigger by which a table refuses writes of holders that have been replaced."""

from __future__ import annotations

from ...config import quote_identifier
from ...errors import InvalidValueError


def fence(table: str, column: str) -> str:
    """The commands that make the trigger, and again the same if it is there."""
    parts = [_name(part, "table") for part in str(table).split(".")]
    if len(parts) not in (1, 2):
        raise InvalidValueError("table must be a name, or schema.name")
    name, quoted = _name(column, "column"), ".".join(map(quote_identifier, parts))
    value = quote_identifier(name)
    schema = f"{quote_identifier(parts[0])}." if len(parts) == 2 else ""
    # 63 bytes for an identifier; the trigger of one table may be of any name.
    function = schema + quote_identifier(f"pgkv_fence_{parts[-1]}_{name}"[:60])
    return f"""\
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $pgkv$
BEGIN
    IF NEW.{value} IS NULL OR NEW.{value} < OLD.{value} THEN
        RAISE EXCEPTION 'fenced: the token of this write is older than the last one of the row'
            USING ERRCODE = '55000',
            HINT = 'The lease of this writer was lost; another holder has written since.';
    END IF;
    RETURN NEW;
END
$pgkv$;
DROP TRIGGER IF EXISTS pgkv_fence ON {quoted};
CREATE TRIGGER pgkv_fence BEFORE UPDATE ON {quoted}
    FOR EACH ROW EXECUTE FUNCTION {function}();
"""


def _name(name: object, what: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name or "$pgkv$" in name:
        raise InvalidValueError(f"{what} must be a name")
    return name
