"""What users ask for: plans, presets, other libraries' formats, and how they resolve."""
