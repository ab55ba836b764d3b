"""Slow, obvious versions of the kernels: one number at a time, Python integers, dense matrices."""

from __future__ import annotations

from math import comb

import numpy as np

MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


def mix64(x: int) -> int:
    """The finaliser of splitmix64."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def stream_key(*words: int) -> int:
    """Fold integers into one key."""
    key = 0
    for word in words:
        key = mix64((key + 0x9E3779B97F4A7C15) ^ mix64(word))
    return key


def gene_hashes(seed: int, epoch: int, cell: int, n_vars: int) -> list[int]:
    """The 32-bit hash of each gene of one cell."""
    key = mix64(stream_key(0x6D61736B, seed, epoch) + cell * 0x9E3779B97F4A7C15)
    low, high = key & MASK32, key >> 32
    hashes = []
    for gene in range(n_vars):
        x = (gene + low) & MASK32
        x ^= x >> 16
        x = (x * 0x21F0AAAD) & MASK32
        x ^= x >> 15
        x ^= high
        x = (x * 0xD35A2D97) & MASK32
        hashes.append(x ^ (x >> 15))
    return hashes


def random_mask(seed: int, epoch: int, cells: np.ndarray, n_vars: int, probability: np.ndarray) -> np.ndarray:
    """Hide the genes whose hash, as a number in [0, 1), is below the probability."""
    rows = []
    for cell, p in zip(cells, probability, strict=True):
        limit = round(float(p) * 2.0**32)
        rows.append([h < limit for h in gene_hashes(seed, epoch, int(cell), n_vars)])
    return np.array(rows, dtype=bool).reshape(len(cells), n_vars)


def exact_mask(seed: int, epoch: int, cells: np.ndarray, n_vars: int, count: int) -> np.ndarray:
    """Hide the genes with the smallest hashes."""
    masked = np.zeros((len(cells), n_vars), dtype=bool)
    for row, cell in enumerate(cells):
        hashes = gene_hashes(seed, epoch, int(cell), n_vars)
        for gene in sorted(range(n_vars), key=lambda g: (hashes[g], g))[:count]:
            masked[row, gene] = True
    return masked


def dense_rows(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_vars: int) -> np.ndarray:
    """A CSR matrix as a dense one."""
    out = np.zeros((len(indptr) - 1, n_vars))
    for row in range(len(indptr) - 1):
        for i in range(indptr[row], indptr[row + 1]):
            out[row, indices[i]] = data[i]
    return out


def quantile_tokens(counts: np.ndarray, n_bins: int) -> np.ndarray:
    """scGPT's bins of each cell's own non-zeros, ties to the right."""
    out = np.zeros(counts.shape, dtype=np.int64)
    for row, values in enumerate(counts):
        present = values > 0
        if present.any():
            edges = np.quantile(values[present].astype(np.float64), np.linspace(0, 1, n_bins - 1))
            out[row, present] = np.digitize(values[present], edges)
    return out


def noise_time(seed: int, epoch: int, position: int) -> float:
    """Second coordinate of Sobol's sequence: Pascal's matrix, 20 scrambled digits, one flip for the rest, from 1 downwards."""
    key = stream_key(0x6E6F6973, seed, epoch)
    ones = [j for j in range(64) if position >> j & 1]
    digits = sum((sum(comb(j, i) for j in ones) % 2) << i for i in range(64))
    low = 0
    for bit in range(20):
        low |= ((digits >> bit ^ mix64(key ^ (low | 1 << (bit + 1)))) & 1) << bit
    digits = low | ((digits >> 20 ^ mix64(key + low)) << 20)
    return 1 - sum((digits >> i & 1) * 2.0 ** -(i + 1) for i in range(53))
