"""The exhibits, what the papers claim of them, what was measured, and the pages that show it."""
