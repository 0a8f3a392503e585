"""What begins when, and what goes together."""
