"""Everything of the request path that is not an engine: edge, fronts, anchor and router process."""
