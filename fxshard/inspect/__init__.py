"""What a compiled program holds, for people."""
