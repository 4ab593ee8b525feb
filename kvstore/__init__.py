"""KV state: the connector that moves it between engines, and the leases that guard it.

The distributed store (index, tiers, eviction, store nodes) will live here too.
"""
