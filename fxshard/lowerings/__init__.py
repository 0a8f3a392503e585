"""What a rank runs where an operator cannot run on its part alone."""
