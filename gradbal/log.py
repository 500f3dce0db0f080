"""What users may not expect, said once."""

import logging

from gradbal.graph import Plan

log = logging.getLogger("gradbal")


class Log:
    """Puts every line into the log only once."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def tell_once(self, topic: str, message: str) -> None:
        """Put a line into the log, unless its topic has been told already."""
        if topic not in self.told:
            self.told.add(topic)
            log.warning(message)

    def about(self, plan: Plan) -> None:
        """Tell what is remarkable about a graph."""
        if plan.foreign:
            self.tell_once(
                "foreign",
                f"{plan.foreign} parameters under the losses belong to no group of the base "
                "optimizer; their gradients are left alone.",
            )
        if plan.one_node:
            self.tell_once(
                "one node",
                "One operation makes several losses (a compiled model or a head with several "
                "outputs), so every parameter under it counts as shared.",
            )
