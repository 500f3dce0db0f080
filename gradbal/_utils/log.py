"""What users may not expect, said once."""

import logging

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
