"""How much is cut from where, and which neurons: everything here is plain data and read-only."""
