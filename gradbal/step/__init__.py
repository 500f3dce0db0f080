"""The parts of a step around the Jacobian: read, weigh, check, write, remember."""
