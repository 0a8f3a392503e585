"""The Python source that a rank runs."""
