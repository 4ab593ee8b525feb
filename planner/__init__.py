"""Pure planning of pool sizes, roles and membership. Empty until the planner is built."""
