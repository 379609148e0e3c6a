"""Exhibits of Benzing 2021, *Gradient descent on neurons and its link to approximate second-order optimization*."""
