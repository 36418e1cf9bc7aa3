"""Edits the text of a cluster's file: only the lines that an edit is about change, every other byte stays.

The YAML parser tells where things are; what is put in, or cut out, is a piece of text there. Writing the parsed
document anew would keep comments too, but not the writer's spacing, and it would take a comment behind a node away
with it. So that a piece of text can't do anything else than it should, the result is parsed and compared with what the
edit should give; a file that is written in a way that this can't deal with (anchors, say) is left to its writer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from provisioner.clusterfile import NODES, compose, load
from provisioner.errors import Conflict, NotFound, SettingsError
from stacks.spec import Availability

AVAILABILITY = "availability"
DEFAULT_NODES = [{"id": "local"}]
"""What a file that names no nodes stands for."""


def add_node(text: str, node: Mapping[str, Any]) -> str:
    """Return the text with one more node, behind the others. Raises Conflict for an id that is there."""
    text = _name_default_nodes(text)
    for other in _nodes_of(load(text, file="the file")):
        if other.get("id") == node["id"]:
            raise Conflict(f"There is a node '{node['id']}' already.")

    def append(document: dict[str, Any]) -> None:
        _nodes_of(document).append(dict(node))

    return _checked(text, _append_item(text, _find_nodes(text), dict(node)), append)


def remove_node(text: str, node_id: str) -> str:
    """Return the text without the node. Raises NotFound, and Conflict for the last one."""
    text = _name_default_nodes(text)
    index = _index_of(text, node_id)
    nodes = _find_nodes(text)
    if len(nodes.value) == 1:
        raise Conflict(f"'{node_id}' is the cluster's last node; a cluster needs one.")

    def drop(document: dict[str, Any]) -> None:
        del _nodes_of(document)[index]

    return _checked(text, _cut_item(text, nodes, index), drop)


def set_availability(text: str, node_id: str, availability: Availability) -> str:
    """Return the text with that availability; `active`, the default, is not written. Raises NotFound."""
    text = _name_default_nodes(text)
    index = _index_of(text, node_id)
    node = _find_nodes(text).value[index]
    at = next((at for at, (key, _) in enumerate(node.value) if key.value == AVAILABILITY), None)

    def put(document: dict[str, Any]) -> None:
        entry = _nodes_of(document)[index]
        entry.pop(AVAILABILITY, None)
        if availability is not Availability.ACTIVE:
            entry[AVAILABILITY] = availability.value

    if at is None:
        edited = text if availability is Availability.ACTIVE else _put_key(text, node, AVAILABILITY, availability.value)
    elif availability is Availability.ACTIVE:
        edited = _cut_key(text, node, at)
    else:
        value = node.value[at][1]
        edited = _splice(text, value.start_mark.index, value.end_mark.index, _quoted(value, availability.value))
    return _checked(text, edited, put)


def _checked(before: str, after: str, change: Callable[[dict[str, Any]], None]) -> str:
    expected = _apart(load(before, file="the file"))
    change(expected)
    try:
        done = load(after, file="the file") == expected
    except SettingsError:
        done = False
    if not done:
        raise _by_hand()
    return after


def _apart(value: Any) -> Any:
    """Return a copy in which what the text shares (by an alias) is not shared any more."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


def _by_hand() -> SettingsError:
    return SettingsError(
        "The cluster's file is written in a way that this command can't change safely.",
        resolution="Change it by hand; a running service takes it over.",
    )


def _nodes_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = document["config"][NODES]
    return nodes


def _index_of(text: str, node_id: str) -> int:
    ids = [node.get("id") for node in _nodes_of(load(text, file="the file"))]
    if node_id not in ids:
        raise NotFound(f"There is no node '{node_id}' in the cluster's file; it has {', '.join(map(str, ids))}.")
    return ids.index(node_id)


# ---- where things are


def _value_of(mapping: Node | None, key: str) -> Node | None:
    if not isinstance(mapping, MappingNode):
        return None
    return next((value for name, value in mapping.value if name.value == key), None)


def _find_nodes(text: str) -> SequenceNode:
    nodes = _value_of(_value_of(compose(text), "config"), NODES)
    if not isinstance(nodes, SequenceNode) or not all(isinstance(node, MappingNode) for node in nodes.value):
        raise _by_hand()
    return nodes


def _name_default_nodes(text: str) -> str:
    """Return the text with the node that a file without any stands for."""
    root = compose(text)
    config = _value_of(root, "config")
    if _value_of(config, NODES) is not None:
        return text

    def put(document: dict[str, Any]) -> None:
        document.setdefault("config", {})[NODES] = DEFAULT_NODES

    if isinstance(config, MappingNode):
        return _checked(text, _put_key(text, config, NODES, DEFAULT_NODES), put)
    newline = _newline_of(text)
    apart = newline if text and not text.endswith("\n") else ""
    block = _as_block({"config": {NODES: DEFAULT_NODES}}, column=0, newline=newline)
    return _checked(text, f"{text}{apart}{block}{newline}", put)


def _end_of(node: Node, *, key: Node | None = None) -> int:
    """Return the index right behind what is written of a node; a block's own mark is behind the comments after it."""
    if key is not None and node.start_mark.index < key.end_mark.index:
        raise _by_hand()  # an alias
    if key is not None and isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index:
        return int(key.end_mark.index) + 1  # nothing but the colon
    if not isinstance(node, MappingNode | SequenceNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end_of(last[1], key=last[0]) if isinstance(last, tuple) else _end_of(last)


def _behind_line(text: str, index: int) -> int:
    """Return where the line after the one of `index` begins."""
    if index and text[index - 1] == "\n":
        return index
    return text.find("\n", index) + 1 or len(text)


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _behind_own_comments(text: str, index: int, *, column: int) -> int:
    """Return where the comments end that follow, indented deeper than `column`: they are of what is above."""
    while index < len(text):
        end = _behind_line(text, index + 1)
        line = text[index:end]
        words = line.lstrip(" ")
        if not words.startswith("#") or len(line) - len(words) <= column:
            break
        index = end
    return index


# ---- putting in and cutting out


def _append_item(text: str, items: SequenceNode, value: dict[str, Any]) -> str:
    if items.flow_style:
        if not items.value:
            return _splice(text, items.start_mark.index, items.end_mark.index, f"[{json.dumps(value)}]")
        end = _end_of(items.value[-1])
        return _splice(text, end, end, f", {json.dumps(value)}")
    column, last = items.start_mark.column, items.value[-1]
    inner = column + 2 if last.flow_style else last.start_mark.column
    block = _as_block(value, column=inner, newline=_newline_of(text))
    dashed = f"{' ' * column}-{' ' * (inner - column - 1)}{block[inner:]}"
    end = _behind_own_comments(text, _behind_line(text, _end_of(last)), column=column)
    return _insert_lines(text, end, dashed)


def _cut_item(text: str, items: SequenceNode, index: int) -> str:
    item = items.value[index]
    if items.flow_style:
        if index:
            return _splice(text, _end_of(items.value[index - 1]), _end_of(item), "")
        return _splice(text, item.start_mark.index, items.value[1].start_mark.index, "")
    column = items.start_mark.column
    start = _line_start(text, item.start_mark.index)
    while text[start + column : start + column + 1] != "-":  # the dash may stand on a line above
        if not start:
            raise _by_hand()
        start = _line_start(text, start - 1)
    end = _behind_own_comments(text, _behind_line(text, _end_of(item)), column=column)
    return _cut_lines(text, start, end)


def _put_key(text: str, mapping: MappingNode, key: str, value: Any) -> str:
    if mapping.flow_style:
        quoted = bool(mapping.value) and mapping.value[0][0].style == '"'
        plain = not quoted and isinstance(value, str)
        put = f"{key}: {value}" if plain else f"{json.dumps(key)}: {json.dumps(value)}"
        if not mapping.value:
            return _splice(text, mapping.start_mark.index, mapping.end_mark.index, f"{{{put}}}")
        last_key, last = mapping.value[-1]
        end = _end_of(last, key=last_key)
        return _splice(text, end, end, f", {put}")
    block = _as_block({key: value}, column=mapping.start_mark.column, newline=_newline_of(text))
    return _insert_lines(text, _behind_line(text, _end_of(mapping)), block)


def _cut_key(text: str, mapping: MappingNode, at: int) -> str:
    key, value = mapping.value[at]
    end = _end_of(value, key=key)
    if at == 0:
        if len(mapping.value) == 1:
            raise _by_hand()
        return _splice(text, key.start_mark.index, mapping.value[1][0].start_mark.index, "")
    if mapping.flow_style:
        before_key, before = mapping.value[at - 1]
        return _splice(text, _end_of(before, key=before_key), end, "")
    return _cut_lines(text, _line_start(text, key.start_mark.index), _behind_line(text, end))


def _splice(text: str, start: int, end: int, put: str) -> str:
    return text[:start] + put + text[end:]


def _insert_lines(text: str, at: int, lines: str) -> str:
    newline = _newline_of(text)
    if at == len(text) and not text.endswith("\n"):
        return f"{text}{newline}{lines}"
    return _splice(text, at, at, lines + newline)


def _cut_lines(text: str, start: int, end: int) -> str:
    if end == len(text) and not text.endswith("\n"):  # the file ended without a line end, and shall again
        newline = _newline_of(text)
        start -= len(newline) if text[:start].endswith(newline) else 0
    return _splice(text, start, end, "")


def _newline_of(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _quoted(scalar: ScalarNode, value: str) -> str:
    return f"{scalar.style}{value}{scalar.style}" if scalar.style in ("'", '"') else value


def _as_block(value: Mapping[str, Any], *, column: int, newline: str) -> str:
    """Return the map as lines of YAML, indented, without the last line's end; what is short and inner on one line."""
    yaml = YAML()
    yaml.width = 1_000_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump({key: _styled(inner, key=key) for key, inner in value.items()}, out)
    return newline.join(" " * column + line for line in out.getvalue().splitlines())


def _styled(value: Any, *, key: str) -> Any:
    if isinstance(value, dict) and key in ("ports", "cloud"):
        styled = CommentedMap(value)
        styled.fa.set_flow_style()
        return styled
    if isinstance(value, list | tuple) and key == "ssh_opts":
        items = CommentedSeq(value)
        items.fa.set_flow_style()
        return items
    return value
