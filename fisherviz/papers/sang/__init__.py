"""Exhibits of Sang et al. 2022, *Component-wise natural gradient descent*."""
