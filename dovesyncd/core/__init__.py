"""Everything that decides and nothing that acts: no I/O, no clock, no randomness."""
