"""Exhibits of Martens & Grosse 2015, *Optimizing neural networks with Kronecker-factored approximate curvature*."""
