"""Who lives, where, and what the ranks agree on."""
