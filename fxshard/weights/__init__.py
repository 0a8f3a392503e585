"""Where the weights lie, how they come in, and how they go out."""
