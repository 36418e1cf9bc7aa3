"""Property values: between protobuf's `Struct` and plain Python.

The engine's numbers are all floats: whole ones become `int` here. A value that is not known yet (in a preview) is
`UNKNOWN`. Our plugins don't ask for secrets, outputs or resource references as such, so the engine sends their plain
values, and marks what comes back itself; a provider's configuration is the exception, and is unwrapped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import struct_pb2
from pulumi.runtime import rpc

Properties = dict[str, Any]
"""A resource's inputs or outputs: None, bool, int, float, str, list, dict or `UNKNOWN`."""


class Unknown:
    """The type of `UNKNOWN`."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = Unknown()
"""A value that only an update can tell."""

_SIGNATURE: Final = rpc._special_sig_key
_WRAPPERS: Final = {rpc._special_secret_sig: "value", rpc._special_output_value_sig: "value"}


def to_plain(struct: struct_pb2.Struct) -> Properties:
    """Return the values of a protobuf struct as plain Python."""
    return {key: _value_to_plain(value) for key, value in struct.fields.items()}


def _value_to_plain(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return UNKNOWN if value.string_value == rpc.UNKNOWN else value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            fields = value.struct_value.fields
            if _SIGNATURE not in fields:
                return to_plain(value.struct_value)
            signature = fields[_SIGNATURE].string_value
            if signature in _WRAPPERS:
                inner = _WRAPPERS[signature]
                return _value_to_plain(fields[inner]) if inner in fields else UNKNOWN
            if signature == rpc._special_resource_sig:
                return _value_to_plain(fields["id"]) if "id" in fields else fields["urn"].string_value
            return to_plain(value.struct_value)
        case "list_value":
            return [_value_to_plain(item) for item in value.list_value.values]
        case _:
            return None


def to_struct(properties: Mapping[str, Any]) -> struct_pb2.Struct:
    """Return plain values as a protobuf struct; None stays null."""
    struct = struct_pb2.Struct()
    for key, value in properties.items():
        _fill(struct.fields[key], value)
    return struct


def _fill(target: struct_pb2.Value, value: Any) -> None:
    if value is None:
        target.null_value = struct_pb2.NULL_VALUE
    elif value is UNKNOWN:
        target.string_value = rpc.UNKNOWN
    elif isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int | float):
        target.number_value = value
    elif isinstance(value, str):
        target.string_value = value
    elif isinstance(value, Mapping):
        target.struct_value.SetInParent()
        for key, item in value.items():
            _fill(target.struct_value.fields[key], item)
    elif isinstance(value, list | tuple):
        target.list_value.SetInParent()
        for item in value:
            _fill(target.list_value.values.add(), item)
    else:
        raise TypeError(f"A property can't be a {type(value).__name__}.")


def has_unknowns(value: Any) -> bool:
    """Say whether a value is, or contains, `UNKNOWN`."""
    if isinstance(value, Mapping):
        return any(has_unknowns(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_unknowns(item) for item in value)
    return value is UNKNOWN
