"""KV state: the connector that moves it between engines, the leases that guard it, and the index.

The rest of the distributed store (tiers, eviction, store nodes) will live here too.
"""
