"""The router unit, one per node: anchor, edge and fronts, and the deployment that runs them."""
