"""Properties of resources as a table, and what follows from the table: checking and comparing.

A property's `Kind` says which values it takes and when two of them mean the same: `null`, `[]` and an absent property;
`2` and `2.0`; sets in any order; `SYS_ADMIN` and `CAP_SYS_ADMIN`. Everything that is compared is compared in that
canonical form, so that neither the official plugin's way of writing a state nor Docker's shows up as a change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from provisioner.plugins.resources import Change, ChangeKind, Checked, Difference, Failure
from provisioner.plugins.values import UNKNOWN, Properties, has_unknowns

DEFAULTS_KEY = "__defaults"


class Unfit(ValueError):
    """A value that a property can't take; the text says what it takes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: how it is brought into the form in which it is compared, or refused with `Unfit`."""

    canonical: Callable[[Any], Hashable]
    empty: Hashable
    """The canonical form of null."""
    element_defaults: Mapping[str, Any] | None = None
    """For objects and lists of objects: defaults of their members; not None makes `__defaults` be recorded."""

    def of(self, value: Any) -> Hashable:
        """Return the canonical form; raise `Unfit`."""
        return self.empty if value is None else self.canonical(value)


@dataclass(frozen=True, slots=True)
class Property:
    """One input of a resource type."""

    kind: Kind
    replace: bool = True
    """Whether a change needs a new resource."""
    default: Any = None
    required: bool = False
    drifts: bool = False
    """Whether it can be set behind our back (`docker update`) where the program says nothing about it."""


Table = Mapping[str, Property]


def _text(value: Any) -> Hashable:
    if not isinstance(value, str):
        raise Unfit("must be a text")
    return value


def _number(value: Any) -> Hashable:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit("must be a whole number")
    return value


def _flag(value: Any) -> Hashable:
    if not isinstance(value, bool):
        raise Unfit("must be true or false")
    return value


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unfit("must be a list")
    return value


def _members(value: Any, *, required: tuple[str, ...], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Unfit("must be an object")
    members = {key: item for key, item in value.items() if item is not None and key != DEFAULTS_KEY}
    for key in members:
        if key not in required and key not in allowed:
            raise Unfit(f"has a member '{key}' that is not supported")
    for key in required:
        if key not in members:
            raise Unfit(f"needs the member '{key}'")
    return members


def _texts(value: Any) -> Hashable:
    return tuple(_text(item) for item in _items(value))


def _text_set(value: Any) -> Hashable:
    return frozenset(_text(item) for item in _items(value))


def _text_map(value: Any) -> Hashable:
    if not isinstance(value, Mapping):
        raise Unfit("must be an object of texts")
    return frozenset((key, _text(item)) for key, item in value.items() if key != DEFAULTS_KEY)


def _labels(value: Any) -> Hashable:
    labels = [_members(item, required=("label", "value")) for item in _items(value)]
    return frozenset((_text(label["label"]), _text(label["value"])) for label in labels)


def _capability(value: Any) -> str:
    return str(_text(value)).upper().removeprefix("CAP_")


def _capabilities(value: Any) -> Hashable:
    members = _members(value, required=(), allowed=("adds", "drops"))
    both = tuple(frozenset(map(_capability, _items(members.get(key, [])))) for key in ("adds", "drops"))
    return None if both == (frozenset(), frozenset()) else both


def _port(value: Any) -> Hashable:
    port = _members(value, required=("internal",), allowed=("external", "ip", "protocol"))
    internal, external = _number(port["internal"]), _number(port.get("external", 0))
    return internal, external, _text(port.get("ip", "0.0.0.0")), _text(port.get("protocol", "tcp"))


def _ports(value: Any) -> Hashable:
    return frozenset(_port(item) for item in _items(value))


def _mount(value: Any) -> Hashable:
    # The three kinds of options are recorded as null by the official plugin; none of them can be asked for.
    mount = _members(value, required=("target", "type"), allowed=("source", "readOnly"))
    if mount["type"] not in ("bind", "volume", "tmpfs"):
        raise Unfit("has a type that is none of bind, volume and tmpfs")
    read_only = _flag(mount.get("readOnly", False))
    return _text(mount["type"]), _text(mount.get("source", "")), _text(mount["target"]), read_only


def _mounts(value: Any) -> Hashable:
    return frozenset(_mount(item) for item in _items(value))


def _ulimits(value: Any) -> Hashable:
    limits = [_members(item, required=("name", "soft", "hard")) for item in _items(value)]
    return frozenset((_text(item["name"]), _number(item["soft"]), _number(item["hard"])) for item in limits)


def nano_cpus(value: Any) -> int:
    """Return a number of CPUs that is written as text (`"1.5"`) in billionths; raise `Unfit`."""
    try:
        nano = Decimal(str(_text(value))) * 10**9
    except InvalidOperation:
        raise Unfit('must be a number of CPUs as text, such as "1.5"') from None
    if not nano.is_finite() or nano < 0 or nano != int(nano):
        raise Unfit('must be a number of CPUs as text, such as "1.5"')
    return int(nano)


def _restart(value: Any) -> Hashable:
    if value not in ("no", "on-failure", "always", "unless-stopped"):
        raise Unfit("must be one of no, on-failure, always and unless-stopped")
    return str(value)


def _network_mode(value: Any) -> Hashable:
    mode = _text(value)
    return "bridge" if mode == "default" else mode


TEXT = Kind(_text, empty="")
NUMBER = Kind(_number, empty=0)
FLAG = Kind(_flag, empty=False)
TEXTS = Kind(_texts, empty=())
TEXT_SET = Kind(_text_set, empty=frozenset())
TEXT_MAP = Kind(_text_map, empty=frozenset())
LABELS = Kind(_labels, empty=frozenset(), element_defaults={})
CAPABILITIES = Kind(_capabilities, empty=None, element_defaults={})
PORTS = Kind(_ports, empty=frozenset(), element_defaults={"ip": "0.0.0.0", "protocol": "tcp"})
MOUNTS = Kind(_mounts, empty=frozenset(), element_defaults={})
ULIMITS = Kind(_ulimits, empty=frozenset(), element_defaults={})
CPUS = Kind(nano_cpus, empty=0)
RESTART = Kind(_restart, empty="no")
NETWORK_MODE = Kind(_network_mode, empty="bridge")


def check_inputs(table: Table, news: Properties) -> Checked:
    """Validate inputs and fill in defaults, recorded under `__defaults` as the official plugin does it."""
    inputs = {key: value for key, value in news.items() if value is not None and key != DEFAULTS_KEY}
    failures = [
        Failure(key, f"'{key}' is not supported by the docker plugin of Machineuse.")
        for key in inputs
        if key not in table
    ]
    failures += [
        Failure(key, f"'{key}' is required.") for key, known in table.items() if known.required and key not in inputs
    ]
    for key, value in list(inputs.items()):
        if key not in table or has_unknowns(value):
            continue
        try:
            table[key].kind.of(value)
        except Unfit as unfit:
            failures.append(Failure(key, f"'{key}' {unfit}."))
        else:
            inputs[key] = _with_element_defaults(table[key].kind, value)
    defaults = {key: known.default for key, known in table.items() if known.default is not None and key not in inputs}
    return Checked(
        inputs={DEFAULTS_KEY: sorted(defaults), **inputs, **defaults},
        failures=tuple(failures),
    )


def _with_element_defaults(kind: Kind, value: Any) -> Any:
    defaults = kind.element_defaults
    if defaults is None:
        return value
    if isinstance(value, list):
        return [_with_element_defaults(kind, item) for item in value]
    given = {key: item for key, item in value.items() if item is not None and key != DEFAULTS_KEY}
    missing = {key: item for key, item in defaults.items() if key not in given}
    return {DEFAULTS_KEY: sorted(missing), **given, **missing}


def same(kind: Kind, one: Any, other: Any) -> bool:
    """Say whether two values mean the same; values that a kind can't take are compared as they are."""
    if one is UNKNOWN or other is UNKNOWN or has_unknowns(one) or has_unknowns(other):
        return False
    try:
        return kind.of(_without_nulls(one)) == kind.of(_without_nulls(other))
    except Unfit:
        return bool(one == other)


def _without_nulls(value: Any) -> Any:
    """Drop null members of objects: the official plugin writes out every member that an object could have."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def compare(table: Table, *, old_inputs: Properties, old_outputs: Properties, news: Properties) -> Difference:
    """Compare what is wanted with what was recorded.

    What the program says is compared with what is. What it does not say is left as it is, unless it said so before, or
    it `drifts`.
    """
    changes: dict[str, Change] = {}
    for key, known in table.items():
        old = old_outputs.get(key, old_inputs.get(key))
        new = news.get(key)
        if new is not None:
            if not same(known.kind, old, new):
                kind = ChangeKind.ADD if old in (None, [], {}, "") else ChangeKind.UPDATE
                changes[key] = Change(kind, replace=known.replace)
        elif not same(known.kind, old if known.drifts else old_inputs.get(key), None):
            changes[key] = Change(ChangeKind.DELETE, replace=True)  # no engine takes a limit back in place
    return Difference(changes)


def keep_wording(table: Table, *, olds: Properties, news: Properties) -> Properties:
    """Return `news` with every value that means the same as the recorded one written as it was recorded.

    When nothing changed at all, that is the record itself, the official plugin's private entries included.
    """
    merged: Properties = {}
    for key, new in news.items():
        old = olds.get(key)
        known = table.get(key)
        equal = same(known.kind, old, new) if known is not None else (old or None) == (new or None)
        merged[key] = old if key in olds and equal else new
    private = {key: value for key, value in olds.items() if key.startswith("__")}
    if all(merged[key] is olds.get(key) or merged[key] == olds.get(key) for key in merged):
        return private | merged
    private.pop("__pulumi_raw_state_delta", None)  # describes the record that is no more
    return private | merged


def as_declared(table: Table, *, inputs: Properties, outputs: Properties) -> Properties:
    """Return the inputs as they would have to be to declare what is: drift shows as a difference from them."""
    return {
        key: outputs[key]
        if key in table and key in outputs and not same(table[key].kind, value, outputs[key])
        else value
        for key, value in inputs.items()
    }
