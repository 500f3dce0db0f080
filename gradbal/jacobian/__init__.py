"""Task gradients: the passes that compute them (loop, vmap, factored), and how they are kept."""
