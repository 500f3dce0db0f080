"""The autograd graph: losses as its roots, the walk, the plan (heads, cut, trunk), costs."""
