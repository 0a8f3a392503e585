"""What a node is: its placements, where it comes from, and the conversions between placements."""
