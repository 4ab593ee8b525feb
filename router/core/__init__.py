"""Pure cores: they decide and reserve, without I/O, clock or unseeded randomness."""
