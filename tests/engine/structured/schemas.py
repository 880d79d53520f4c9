"""Fifty JSON schemas as applications have them, each difficult in its own way. By name."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def record(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> Schema:
    """An object of these properties and no others; by default all are required."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def text(most: int = 12, least: int = 0, **more: Any) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most, **more}


def array(items: Any, least: int = 0, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


def integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def const(value: Any) -> Schema:
    return {"const": value}


def enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def pattern(regex: str, **more: Any) -> Schema:
    return {"type": "string", "pattern": regex, **more}


def formatted(name: str, **more: Any) -> Schema:
    return {"type": "string", "format": name, **more}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def any_of(*options: Any) -> Schema:
    return {"anyOf": list(options)}


def one_of(*options: Any) -> Schema:
    return {"oneOf": list(options)}


POINT = record({"x": integer(-90, 90), "y": integer(-180, 180)})

SCHEMAS: dict[str, Schema] = {
    # ── references and recursion
    "linked list": {
        **ref("node"),
        "$defs": {"node": record({"value": integer(0, 99), "next": any_of(ref("node"), {"type": "null"})})},
    },
    "a tree of three levels": {
        **ref("tree_3"),
        "$defs": {
            **{
                f"tree_{n}": any_of(
                    {"type": "null"}, record({side: ref(f"tree_{n - 1}") for side in ("left", "right")})
                )
                for n in (3, 2, 1)
            },
            "tree_0": integer(0, 9),
        },
    },
    "arithmetic": {
        **ref("sum"),
        "$defs": {
            "sum": one_of(
                integer(0, 9),
                record({"op": enum("+", "-"), "args": array(ref("sum"), 2, 2)}),
            )
        },
    },
    "two that refer to one another": {
        **ref("folder"),
        "$defs": {
            "folder": record({"name": pattern("^[a-z]{1,8}$"), "entries": array(ref("entry"), 0, 2)}),
            "entry": any_of(record({"file": text(6, 1)}), record({"link": text(6, 1)}), ref("folder")),
        },
    },
    "root reference": record({"label": text(5), "children": array({"$ref": "#"}, 0, 1)}),
    "draft-07 definitions": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"id": {"type": "integer", "minimum": 1}, "pair": array({"$ref": "#/definitions/id"}, 2, 2)},
        **record({"pairs": array({"$ref": "#/definitions/pair"}, 1, 3)}),
    },
    "escaped pointer": {
        "$defs": {"a/b~c": enum("slash", "tilde")},
        **record({"v": {"$ref": "#/$defs/a~1b~0c"}}),
    },
    "a reference with siblings": {
        "$defs": {"short": {"type": "string", "maxLength": 9}},
        **record({"v": {"$ref": "#/$defs/short", "minLength": 3, "description": "three to nine"}}),
    },
    # ── unions
    "one of by tag": {
        **array(
            one_of(
                record({"kind": const("circle"), "radius": {"type": "number", "exclusiveMinimum": 0, "maximum": 100}}),
                record({"kind": const("square"), "side": {"type": "number", "minimum": 1, "maximum": 2}}),
                record({"kind": const("label"), "text": text(10)}),
            ),
            2,
            4,
        )
    },
    "any of types": record({"v": any_of({"type": "integer"}, text(5), {"type": "boolean"}, {"type": "null"}, POINT)}),
    "types in a list": record(
        {"v": {"type": ["integer", "null", "boolean"]}, "w": {"type": ["string", "null"], "maxLength": 4}}
    ),
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"id": integer(1, 999)}, "required": ["id"]},
            {"type": "object", "properties": {"name": text(8, 1)}, "required": ["name"]},
        ],
        "properties": {"id": True, "name": True},
        "additionalProperties": False,
    },
    "all of bounds": record({"n": {"type": "integer", "allOf": [{"minimum": 10}, {"maximum": 20}, {"minimum": 15}]}}),
    "all of over any of": record(
        {"v": {"allOf": [any_of({"type": "integer"}, {"type": "boolean"}), any_of({"type": "boolean"}, text(3))]}}
    ),
    "nested unions": record(
        {"v": any_of(one_of(const(1), const("one")), any_of(enum(2, "two"), enum([3], {"three": 3})))}
    ),
    "optional by null": record(
        {"nick": any_of(text(6), {"type": "null"}), "age": any_of(integer(0, 150), {"type": "null"})}
    ),
    # ── values that are given
    "enum of everything": record(
        {"v": enum(None, True, False, 0, -1.5, 1e3, "", 'é\n"\\/', [], [1, [2]], {}, {"a": {"b": None}})}
    ),
    "const object": record(
        {"meta": const({"version": 3, "flags": ["x", "y"], "nested": {"deep": True}}), "n": integer(0, 3)}
    ),
    "unicode names": record({"名前": text(4), "größe": integer(1, 300), "emoji 🙂": enum("ja", "нет", "はい", "🙃")}),
    "names to be escaped": record(
        {'a"b': {"type": "boolean"}, "c\\d": {"type": "boolean"}, "e\nf": {"type": "null"}, "": const(0)}
    ),
    "many choices": record({"code": enum(*(f"{a}{b}-{n}" for a in "ABC" for b in "XYZ" for n in range(40)))}),
    # ── numbers
    "integer bounds": record(
        {
            "a": integer(-5, 5),
            "b": {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1001},
            "c": integer(-1000, -998),
        }
    ),
    "number bounds": record(
        {
            "p": {"type": "number", "minimum": 0, "maximum": 1},
            "t": {"type": "number", "exclusiveMinimum": -273.15, "maximum": -100},
            "f": {"type": "number", "minimum": 0.001, "exclusiveMaximum": 0.0025},
        }
    ),
    "multiples": record(
        {
            "even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 50},
            "five": {"type": "integer", "multipleOf": 5},
        }
    ),
    "any number": array({"type": "number"}, 3, 6),
    "large integers": record({"id": integer(2**53, 2**53 + 10**6), "n": integer(-(2**31), 2**31 - 1)}),
    # ── strings
    "lengths": array(text(3, 3), 4, 4),
    "plate": record(
        {"plate": pattern("^[A-Z]{1,3}-[A-Z]{1,2} [1-9][0-9]{0,3}$"), "hex": pattern("^#([0-9a-f]{3}|[0-9a-f]{6})$")}
    ),
    "pattern within": record({"v": pattern("cat|dog", maxLength=20)}),
    "pattern and length": record(
        {"v": pattern("^[a-z]+(-[a-z]+)*$", minLength=8, maxLength=16), "w": pattern("^\\w{2,5}\\s\\d+$", maxLength=9)}
    ),
    "pattern of unicode": record({"v": pattern("^[äöüß]{2,6}$"), "w": pattern("^[^a-zA-Z]{1,5}$")}),
    "times": record(
        {"at": formatted("date-time"), "on": formatted("date"), "time": formatted("time"), "for": formatted("duration")}
    ),
    "addresses": record(
        {"v4": formatted("ipv4"), "v6": formatted("ipv6"), "host": formatted("hostname", maxLength=30)}
    ),
    "identities": record({"id": formatted("uuid"), "mail": formatted("email", maxLength=40)}),
    "links": array(formatted("uri", maxLength=60), 1, 2),
    "a format nobody knows": record(
        {"v": formatted("colour", maxLength=5), "n": {"type": "integer", "format": "int64", "minimum": 0, "maximum": 7}}
    ),
    # ── objects
    "optional properties": record(
        {"a": integer(0, 9), "b": {"type": "boolean"}, "c": text(3), "d": array({"type": "null"}, 0, 2)}, ["c"]
    ),
    "all optional": record({f"p{i}": integer(i, i + 3) for i in range(8)}, []),
    "further properties": {
        "type": "object",
        "properties": {"id": integer(1, 9)},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": integer(0, 9), "^s_[a-z]{1,3}$": text(3)},
        "additionalProperties": False,
    },
    "a map of records": {"type": "object", "additionalProperties": POINT},
    "required, not described": {
        "type": "object",
        "properties": {"a": integer(1, 2)},
        "required": ["a", "b"],
        "additionalProperties": {"type": "null"},
    },
    "deep nesting": record(
        {
            "a": record(
                {
                    "b": record(
                        {
                            "c": record(
                                {
                                    "d": record(
                                        {"e": record({"f": array(array(array(integer(0, 1), 1, 2), 1, 2), 1, 2)})}
                                    )
                                }
                            )
                        }
                    )
                }
            )
        }
    ),
    "forty fields": record(
        {f"field_{i:02}": [integer(0, i), text(4), {"type": "boolean"}, enum("a", "b")][i % 4] for i in range(40)}
    ),
    # ── arrays
    "tuple": {
        "type": "array",
        "prefixItems": [enum("GET", "PUT"), pattern("^/[a-z]{1,6}$"), integer(100, 599)],
        "items": False,
        "minItems": 3,
    },
    "tuple with more": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, text(2)],
        "items": integer(0, 5),
        "minItems": 2,
        "maxItems": 6,
    },
    "matrix": array(array({"type": "number", "minimum": -1, "maximum": 1}, 3, 3), 3, 3),
    "any array": {
        "type": "array",
        "maxItems": 3,
        "items": any_of(integer(0, 9), array(any_of(text(2), {"type": "null"}), 0, 2)),
    },
    # ── as applications have them
    "order": record(
        {
            "order_id": formatted("uuid"),
            "customer": record(
                {"name": text(15, 1), "email": formatted("email", maxLength=30), "vip": {"type": "boolean"}},
                ["name", "email"],
            ),
            "lines": array(
                record(
                    {
                        "sku": pattern("^[A-Z]{3}[0-9]{4}$"),
                        "quantity": integer(1, 99),
                        "price": {"type": "number", "minimum": 0, "maximum": 9999},
                    }
                ),
                1,
                3,
            ),
            "status": enum("open", "paid", "shipped"),
            "placed": formatted("date-time"),
        }
    ),
    "tool call": {
        "type": "object",
        "properties": {
            "thought": text(20),
            "call": one_of(
                record(
                    {
                        "name": const("search"),
                        "arguments": record({"query": text(12, 1), "limit": integer(1, 10)}, ["query"]),
                    }
                ),
                record({"name": const("open"), "arguments": record({"url": formatted("uri", maxLength=40)})}),
                record({"name": const("finish"), "arguments": record({})}),
            ),
        },
        "required": ["thought", "call"],
        "additionalProperties": False,
    },
}
