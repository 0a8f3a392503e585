"""Programs in other libraries' loops; each module imports its library, which fxshard itself does not need."""
