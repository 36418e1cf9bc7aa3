"""The document that the service generates keeps the contract: all of openapi.yaml is there, with the same meaning.

The two are written in different versions of OpenAPI (3.0 and 3.1), so they are compared by what they say: references
are followed, and `anyOf [X, null]` is X that may be null. Where an answer may be null is listed here, because the
contract does not say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from openapi_spec_validator import validate

from api.app import create_app
from provisioner.settings import Settings

Json = dict[str, Any]

CONTRACT: Json = yaml.safe_load((Path(__file__).parent / "openapi.yaml").read_text())
NULL_IN_ANSWERS = {
    "Instance.debug_port",
    "Instance.stream_port",
    "Instance.urls.debug",
    "Instance.urls.stream",
    "Node.last_heartbeat",
}
"""There is no port while an instance is dormant, and no heartbeat before the first one."""

REQUEST_SCHEMAS = {"CreateInstanceRequest", "InstanceConfig", "ReviveRequest"}


def make_document(**settings: Any) -> Json:
    services = SimpleNamespace(settings=Settings(**settings))
    document: Json = create_app(services).openapi()
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


OURS = make_document()


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


OPERATIONS = [pytest.param(path, method, op, id=op["operationId"]) for path, method, op in operations(CONTRACT)]


def resolve(part: Json, document: Json) -> Json:
    """Follow references, and take the one meaning out of `anyOf [meaning, null]`."""
    while True:
        if "$ref" in part:
            target: Any = document
            for key in part["$ref"].removeprefix("#/").split("/"):
                target = target[key]
            part = {**target, **{key: value for key, value in part.items() if key != "$ref"}}
        elif "anyOf" in part:
            meanings = [one for one in part["anyOf"] if one.get("type") != "null"]
            assert len(meanings) == 1, part
            rest = {key: value for key, value in part.items() if key != "anyOf"}
            part = {**meanings[0], **rest}
        else:
            return part


def may_be_null(part: Json) -> bool:
    return any(one.get("type") == "null" for one in part.get("anyOf", ()))


def differences(contract: Json, ours: Json, where: str, *, answer: bool) -> Iterator[str]:
    """Say what the contract's schema has that ours does not mean too."""
    if answer and may_be_null(ours) and where not in NULL_IN_ANSWERS:
        yield f"{where} may be null"
    if "$ref" in contract:  # components are compared one by one
        if reference(ours) != reference(contract):
            yield f"{where} is {reference(ours)}, not {reference(contract)}"
        return
    ours = resolve(ours, OURS)
    for key in ("type", "format", "default"):
        if key in contract and contract[key] != ours.get(key):
            yield f"{where}: {key} is {ours.get(key)!r}, not {contract[key]!r}"
    if "enum" in contract and set(contract["enum"]) != set(ours.get("enum", ())):
        yield f"{where}: enum is {ours.get('enum')!r}, not {contract['enum']!r}"
    if "items" in contract:
        yield from differences(contract["items"], ours["items"], f"{where}[]", answer=answer)
    for name, field in contract.get("properties", {}).items():
        if name not in ours["properties"]:
            yield f"{where}.{name} is missing"
        else:
            yield from differences(field, ours["properties"][name], f"{where}.{name}", answer=answer)
    if not answer and set(ours.get("required", ())) - set(contract.get("required", ())):
        yield f"{where} requires {ours['required']}"


@pytest.mark.parametrize(("path", "method", "contract"), OPERATIONS)
def test_every_operation_has_the_contracts_parameters(path: str, method: str, contract: Json) -> None:
    ours = {(p["name"], p["in"]): p for p in OURS["paths"][path][method].get("parameters", ())}
    for parameter in contract.get("parameters", ()):
        expected = resolve(parameter, CONTRACT)
        found = ours.pop((expected["name"], expected["in"]))
        assert found.get("required", False) == expected.get("required", False)
        where = f"{method} {path} {expected['name']}"
        assert not list(differences(expected["schema"], found["schema"], where, answer=False))
    assert not [name for (name, _), parameter in ours.items() if parameter.get("required")], "additions are optional"


@pytest.mark.parametrize(("path", "method", "contract"), OPERATIONS)
def test_every_operation_takes_the_contracts_body(path: str, method: str, contract: Json) -> None:
    ours = OURS["paths"][path][method].get("requestBody")
    expected = contract.get("requestBody")
    assert (ours is None) == (expected is None)
    if expected is None:
        return
    assert ours.get("required", False) == expected.get("required", False)
    for media_type, content in expected["content"].items():
        found = ours["content"][media_type]["schema"]
        assert not list(differences(content["schema"], found, f"{method} {path}", answer=False))
        assert reference(content["schema"]) == reference(found)


@pytest.mark.parametrize(("path", "method", "contract"), OPERATIONS)
def test_every_operation_has_the_contracts_answers(path: str, method: str, contract: Json) -> None:
    ours = OURS["paths"][path][method]["responses"]
    for status, expected in contract["responses"].items():
        assert status in ours
        if "$ref" in expected:
            assert ours[status]["$ref"] == expected["$ref"]
        content = resolve(expected, CONTRACT)["content"]["application/json"]["schema"]
        found = resolve(ours[status], OURS)["content"]["application/json"]["schema"]
        assert reference(content) == reference(found)
        assert resolve(ours[status], OURS)["description"] == resolve(expected, CONTRACT)["description"]


@pytest.mark.parametrize(("path", "method", "contract"), OPERATIONS)
def test_every_operation_has_the_contracts_name(path: str, method: str, contract: Json) -> None:
    ours = OURS["paths"][path][method]
    assert {key: ours[key] for key in ("operationId", "tags", "summary")} == {
        key: contract[key] for key in ("operationId", "tags", "summary")
    }


@pytest.mark.parametrize("name", CONTRACT["components"]["schemas"])
def test_every_schema_has_the_contracts_properties(name: str) -> None:
    schemas = CONTRACT["components"]["schemas"], OURS["components"]["schemas"]
    assert not list(differences(schemas[0][name], schemas[1][name], name, answer=name not in REQUEST_SCHEMAS))


def test_the_service_is_described_as_in_the_contract() -> None:
    assert {key: OURS["info"][key] for key in CONTRACT["info"]} | {
        "license": OURS["info"]["license"]["name"]
    } == CONTRACT["info"] | {"license": CONTRACT["info"]["license"]["name"]}
    assert OURS["tags"] == CONTRACT["tags"]
    assert OURS["components"]["securitySchemes"] == CONTRACT["components"]["securitySchemes"]


def test_the_document_is_valid() -> None:
    validate(OURS)


def test_nothing_is_said_about_422() -> None:
    for path, method, operation in operations(OURS):
        assert "422" not in operation["responses"], f"{method} {path}"
    assert not [name for name in OURS["components"]["schemas"] if "ValidationError" in name]


def test_every_refusal_has_the_same_body() -> None:
    for path, method, operation in operations(OURS):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                content = resolve(response, OURS)["content"]["application/json"]["schema"]
                assert reference(content) == "ErrorResponse", f"{method} {path} {status}"


def test_tokens_are_documented_only_where_they_are_needed() -> None:
    assert "security" not in OURS
    protected = make_document(tokens=("a-secret",))
    assert protected["security"] == CONTRACT["security"]
    for path, method, operation in operations(protected):
        is_open = path == "/health"
        assert (operation.get("security") == []) == is_open, f"{method} {path}"
        assert ("401" in operation["responses"]) != is_open, f"{method} {path}"
    validate(protected)


def reference(schema: Json) -> str | None:
    """Return the name of the component that a schema is, or may be."""
    for one in (schema, *schema.get("anyOf", ())):
        if "$ref" in one:
            return str(one["$ref"]).rpartition("/")[2]
    return None
