"""Nothing of the field: files, memory, progress, checks of options."""
