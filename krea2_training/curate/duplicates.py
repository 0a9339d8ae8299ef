"""Duplicates: the same file, and pictures of nearly the same perceptual and colour hash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .measures import COLOUR_BITS, COLOUR_SHARES, HASH_BITS, Measures

# Pictures that are compared with as many at once: 16 million distances, 64 MB.
_BLOCK = 4096


def same_files(pictures: Sequence[Measures]) -> dict[int, int]:
    """Later pictures whose bytes are those of an earlier one: index to index of the first."""
    first: dict[str, int] = {}
    firsts = [first.setdefault(picture.md5, index) for index, picture in enumerate(pictures)]
    return {index: of for index, of in enumerate(firsts) if of != index}


def near_duplicates(pictures: Sequence[Measures], distance: int, colour: float) -> dict[int, int]:
    """Pictures that are nearly one of those kept before them: index to index of the nearest.

    pictures: readable ones, the best first, since of duplicates the first is kept. Every one is
    compared with what is kept and with nothing else, so that a series of pictures, each a little
    different from the one before, is not all one picture's duplicates.
    distance, colour: as in `Limits`.

    All pairs are compared, by matrix products in blocks: 10^5 pictures take some 10^12 operations.
    """
    signs = _signs(pictures)
    colours = _shares(pictures)
    kept = np.zeros(0, dtype=np.int64)
    found: dict[int, int] = {}

    def pairs(rows: np.ndarray, columns: np.ndarray) -> list[tuple[int, int, float]]:
        """Row, column and distance of those within the limits, by row and then distance."""
        # The product of two hashes of -1 and 1 is the bits that agree less those that differ.
        apart = (HASH_BITS - signs[rows] @ signs[columns].T) / 2
        near = np.argwhere(apart <= distance)
        a, b = rows[near[:, 0]], columns[near[:, 1]]
        bits = apart[near[:, 0], near[:, 1]]
        ok = np.abs(colours[a] - colours[b]).sum(axis=1) <= colour
        a, b, bits = a[ok], b[ok], bits[ok]
        order = np.lexsort((b, bits, a))
        return list(zip(a[order].tolist(), b[order].tolist(), bits[order].tolist(), strict=True))

    for start in range(0, len(pictures), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(pictures)))
        nearest: dict[int, tuple[float, int]] = {}
        for first in range(0, len(kept), _BLOCK):
            for row, column, bits in pairs(block, kept[first : first + _BLOCK]):
                nearest[row] = min(nearest.get(row, (bits, column)), (bits, column))
        left = block[[index not in nearest for index in block.tolist()]]
        for row, column, bits in pairs(left, left):
            # By rows, so what stands before a row is decided.
            if column < row and column not in nearest:
                nearest[row] = min(nearest.get(row, (bits, column)), (bits, column))
        found |= {index: of for index, (_, of) in nearest.items()}
        kept = np.append(kept, block[[index not in nearest for index in block.tolist()]])
    return found


def _signs(pictures: Sequence[Measures]) -> np.ndarray:
    packed = np.frombuffer(b"".join(one.phash for one in pictures), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(-1, HASH_BITS // 8), axis=1)
    return 2 * bits.astype(np.float32) - 1


def _shares(pictures: Sequence[Measures]) -> np.ndarray:
    packed = np.frombuffer(b"".join(one.colours for one in pictures), dtype=np.uint8)
    return packed.reshape(-1, COLOUR_SHARES).astype(np.float32) / 2**COLOUR_BITS
