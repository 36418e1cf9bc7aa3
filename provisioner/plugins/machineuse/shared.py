"""What the resource types of the machineuse package have in common: inputs by a model, and no changes in place."""

from __future__ import annotations

from typing import ClassVar

from provisioner.plugins.machineuse.inputs import Inputs, check
from provisioner.plugins.resources import Call, Checked, ResourceType
from provisioner.plugins.values import Properties


class MachineuseResource(ResourceType):
    """Base of the package's resource types."""

    model: ClassVar[type[Inputs]]

    def check(self, call: Call, *, olds: Properties, news: Properties) -> Checked:
        """Validate the inputs and fill in defaults, by the model."""
        del call, olds
        return check(self.model, news)

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        """Take over new inputs; there is nothing to do for them."""
        del call, id, old_inputs
        return old_outputs | news
