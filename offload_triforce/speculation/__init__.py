"""Hierarchical speculation: exact sampling, the levels, and the algorithm that ties them."""
