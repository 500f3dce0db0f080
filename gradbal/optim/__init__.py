"""Being a torch optimizer: the wrapper, and several base optimizers as one."""
