"""The base of our own resources: gives properties Python's names."""

from __future__ import annotations

import re

import pulumi


class Resource(pulumi.CustomResource):
    """Gives properties Python's names: the engine calls `quickCopy` what the program calls `quick_copy`."""

    def translate_input_property(self, prop: str) -> str:
        head, *rest = prop.split("_")
        return head + "".join(word.capitalize() for word in rest)

    def translate_output_property(self, prop: str) -> str:
        return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match[1].lower(), prop)
