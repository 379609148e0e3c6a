"""Exhibits of Shrestha 2023, *Natural gradient methods: perspectives, efficient-scalable approximations*."""
