"""Numba kernels, each behind a checked public function, and the one home of counter-based random numbers."""
