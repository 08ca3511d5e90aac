"""Conditions on columns and metadata, as plain data writes them down, in SQL.

The adapters of other libraries and the servers translate their spellings to this one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from operator import ge, gt, le, lt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sbert_pg.errors import DeclarationError

#: How other libraries write what is written ``$eq`` and so on here.
SIGNS = {
    "==": "$eq", "!=": "$ne", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte", "in": "$in",
}  # fmt: skip
#: From the name of a field to its column, or to its value within a JSON column.
Fields = Callable[[str], sa.ColumnElement[Any]]
Condition = sa.ColumnElement[bool]

_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "$lt": lt,
    "$lte": le,
    "$gt": gt,
    "$gte": ge,
}

_NUMBERS = (int, float, Decimal)
#: By the type of a column's values: what reads one from a text, and what it is compared with.
_TYPES: dict[type, tuple[Callable[[str], Any], Any]] = {
    int: (int, _NUMBERS),
    float: (float, _NUMBERS),
    Decimal: (Decimal, _NUMBERS),
    bool: (lambda text: {"true": True, "false": False}.get(text), bool),
    date: (date.fromisoformat, date),
    datetime: (datetime.fromisoformat, date),
    time: (time.fromisoformat, time),
    uuid.UUID: (uuid.UUID, uuid.UUID),
}


def condition(conditions: Any, fields: Fields) -> Condition:
    """A condition on metadata as SQL; several in one mapping have to hold together.

    Args:
        conditions: a mapping in the form that LangChain's stores have from MongoDB:
            ``{"topic": "food", "year": {"$gte": 2020}, "$or": [{...}, {...}]}``. Operators are
            ``$eq``, ``$ne``, ``$lt``, ``$lte``, ``$gt``, ``$gte``, ``$in``, ``$nin``, ``$between``,
            ``$exists``, ``$like`` and ``$ilike``, and of arrays ``$any`` and ``$all``, which take a
            list of values, and ``$empty``; ``$and``, ``$or`` and ``$not`` combine. Or a condition
            of SQLAlchemy's, which is taken as it is.
        fields: finds the column of a field.

    A row that has no value of the field differs from every value: ``$ne`` and ``$nin`` find it.
    Values within JSON are compared with those of their own type alone. A text in the place of a
    number, date, time or UUID of a column is read, dates and times in the form of ISO 8601.
    """
    if isinstance(conditions, sa.ClauseElement):
        return sa.and_(conditions)  # type: ignore[arg-type]
    if not isinstance(conditions, Mapping):
        raise DeclarationError(
            f"A filter is a mapping such as {{'topic': 'food'}} or a condition of SQLAlchemy's, "
            f"and this is {conditions!r}."
        )
    return sa.and_(sa.true(), *(_part(key, value, fields) for key, value in conditions.items()))


def combined(how: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Filters as one: ``"and"``, ``"or"``, or ``"not"``, which is that not all of them hold."""
    if not parts:
        return {}
    return {"$not": {"$and": parts}} if how == "not" else {f"${how}": parts}


def _part(key: str, value: Any, fields: Fields) -> Condition:
    if key in ("$and", "$or"):
        return _joined(key, value, fields)
    if key == "$not":
        # Of what is unknown the opposite is unknown: such a row does not meet the condition.
        return sa.not_(sa.func.coalesce(condition(value, fields), sa.false()))
    if key.startswith("$"):
        raise DeclarationError(f"A filter has no operator {key!r} in the place of a field.")
    field = fields(key)
    if not isinstance(value, Mapping):
        return compare(field, "$eq", value)
    return sa.and_(sa.true(), *(compare(field, name, given) for name, given in value.items()))


def _joined(key: str, value: Any, fields: Fields) -> Condition:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DeclarationError(f"{key} takes a list of filters, and was given {value!r}.")
    parts = [condition(part, fields) for part in value]
    return sa.and_(*parts) if key == "$and" else sa.or_(*parts)


def compare(field: sa.ColumnElement[Any], operator: str, value: Any) -> Condition:
    """One comparison of a column, or of a value within JSON, with a value.

    A value may be an expression of the column's type, such as a cast.
    """
    if operator in ("$in", "$nin", "$between", "$any", "$all"):
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
            raise DeclarationError(f"{operator} takes a list, and was given {value!r}.")
        return _among(field, operator, list(value))
    if operator in _SIMPLE:
        return _SIMPLE[operator](field, value)
    if operator not in _ORDER:
        raise DeclarationError(
            f"A filter has no operator {operator!r}; it has $eq, $ne, $lt, $lte, $gt, $gte, $in, "
            "$nin, $between, $exists, $like, $ilike, $any, $all and $empty."
        )
    if value is None:
        raise DeclarationError(f"{operator} compares with a value, and was given None.")
    ordered: Condition = _ORDER[operator](field, _operand(field, value))
    if isinstance(field.type, JSONB) and not isinstance(value, sa.ClauseElement):
        # PostgreSQL orders any two values of JSON, a number before every text.
        return sa.and_(sa.func.jsonb_typeof(field) == _json_type(value), ordered)
    return ordered


def _empty(field: sa.ColumnElement[Any], value: Any) -> Condition:
    array = isinstance(field.type, (JSONB, sa.ARRAY))
    empty = _one_of(field, [None, []] if array else [None])
    return empty if value else sa.not_(sa.func.coalesce(empty, sa.false()))


def _text(field: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    text: sa.ColumnElement[str] = field[()].astext if isinstance(field.type, JSONB) else field
    return text


def _among(field: sa.ColumnElement[Any], operator: str, values: list[Any]) -> Condition:
    if operator == "$between":
        if len(values) != 2:
            raise DeclarationError(f"$between takes two values, and was given {values!r}.")
        return sa.and_(compare(field, "$gte", values[0]), compare(field, "$lte", values[1]))
    if operator == "$in":
        return _one_of(field, values)
    if operator in ("$any", "$all"):
        return _in_array(field, operator, values)
    return sa.and_(sa.true(), *(compare(field, "$ne", value) for value in values))


def _in_array(field: sa.ColumnElement[Any], operator: str, values: list[Any]) -> Condition:
    if not isinstance(field.type, (JSONB, sa.ARRAY)):
        raise DeclarationError(f"{operator} looks into arrays, and {field} is of {field.type!r}.")
    contains = field.bool_op("@>")
    if isinstance(field.type, JSONB):
        parts = [contains(_operand(field, [value])) for value in values]
    else:
        parts = [contains(sa.literal([value], field.type)) for value in values]
    return sa.or_(sa.false(), *parts) if operator == "$any" else sa.and_(sa.true(), *parts)


def _one_of(field: sa.ColumnElement[Any], values: list[Any]) -> Condition:
    operands = [_operand(field, value) for value in values if value is not None]
    parts = [field.is_(None)] if len(operands) < len(values) else []
    if operands:
        # One by one: a list among them is a value of an array, and no row of values.
        typed = [sa.literal(o, field.type) if not isinstance(o, sa.ClauseElement) else o
                 for o in operands]  # fmt: skip
        parts.append(field.in_(typed))
    return sa.or_(sa.false(), *parts)


def _operand(field: sa.ColumnElement[Any], value: Any) -> Any:
    if value is None or isinstance(value, sa.ClauseElement):
        return value
    if not isinstance(field.type, JSONB):
        return _typed(field, value)
    return sa.cast(sa.literal(_dumped(value), sa.Text()), JSONB)


def _typed(field: sa.ColumnElement[Any], value: Any) -> Any:
    """A value as one of the column's type; texts are read, as of dates in ISO 8601."""
    type_ = field.type
    if isinstance(type_, sa.ARRAY) and not isinstance(value, (list, tuple)):
        raise DeclarationError(
            f"{field} is of {type_!r}: compare it with a list, or look into it by $any or $all; "
            f"this is {value!r}."
        )
    if isinstance(type_, sa.String) and isinstance(value, (list, tuple, set, dict)):
        raise DeclarationError(
            f"{field} is of {type_!r}: compare it with one value, or with several by $in; this is "
            f"{value!r}."
        )
    kind = _kind(type_)
    if kind is None:
        return value
    try:
        typed = _read(kind, value)
    except (ValueError, ArithmeticError) as error:
        raise DeclarationError(
            f"{field} is of {type_!r} and is compared with a value of that type, dates and times "
            f"in the form of ISO 8601; this is {value!r}."
        ) from error
    if kind is int and not (isinstance(typed, int) and abs(typed) < 2 ** _bits(type_)):
        # A fraction would be rounded as a value of the type, and a larger number has no place.
        return sa.literal(Decimal(str(typed)), sa.Numeric())
    return typed


def _kind(type_: sa.types.TypeEngine[Any]) -> type | None:
    """A type whose values are read from texts; ``None`` for others and those that convert."""
    try:
        kind = None if isinstance(type_, sa.TypeDecorator) else type_.python_type
    except NotImplementedError:
        return None
    return kind if kind in _TYPES else None


def _read(kind: type, value: Any) -> Any:
    read, accepted = _TYPES[kind]
    typed = read(value) if isinstance(value, str) else value
    if not isinstance(typed, accepted) or (isinstance(typed, bool) and kind is not bool):
        raise ValueError
    return typed


def _bits(type_: sa.types.TypeEngine[Any]) -> int:
    return (
        15 if isinstance(type_, sa.SmallInteger) else 63 if isinstance(type_, sa.BigInteger) else 31
    )


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DeclarationError(
            f"{value!r} cannot be compared with a value within JSON: {error}. Keep such a field "
            "in a column of its own."
        ) from error


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    raise DeclarationError(f"{value!r} has no order within JSON; numbers and texts have.")


_SIMPLE: dict[str, Callable[[Any, Any], Condition]] = {
    "$eq": lambda field, v: field.is_(None) if v is None else field == _operand(field, v),
    "$ne": lambda field, v: (
        field.is_not(None) if v is None else field.is_distinct_from(_operand(field, v))
    ),
    "$exists": lambda field, v: field.is_not(None) if v else field.is_(None),
    "$empty": _empty,
    "$like": lambda field, v: _text(field).like(v),
    "$ilike": lambda field, v: _text(field).ilike(v),
}


__all__ = ["SIGNS", "Condition", "Fields", "combined", "compare", "condition"]
