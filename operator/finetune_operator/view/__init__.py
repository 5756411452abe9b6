"""How a job looks in a terminal: pure functions from a `Scene` to something rich can print."""
