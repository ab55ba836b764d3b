"""Score-entropy discrete diffusion for single-cell RNA-seq."""

__version__ = "0.1.0"
