"""Exhibits that no paper has, on questions that the papers raise."""
