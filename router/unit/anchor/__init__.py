"""The anchor: holds sockets, keeps the unit's processes running, relays, remembers."""
