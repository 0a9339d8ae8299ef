"""K blocks of GGUF from numbers, by the layout's definition; the gguf package only reads them.

Plain rounding to the nearest step, without the searches of llama.cpp: a little less exact.
"""

import numpy as np

BLOCK = 256


def quantise(array: np.ndarray, form: str) -> np.ndarray:
    """(rows, columns) of numbers to (rows, bytes) of `form`; 256 has to divide the columns."""
    blocks = _WRITERS[form](array.reshape(-1, BLOCK).astype(np.float32))
    return np.concatenate(blocks, axis=1).reshape(array.shape[0], -1)


def _q6(x):
    scale, d, q = _symmetric(x, steps=32, most=127)
    q = (q + 32).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], -1)
    return _bytes(ql), _bytes(_shifted(high, 2)), scale.astype(np.int8).view(np.uint8), d


def _q3(x):
    scale, d, q = _symmetric(x, steps=4, most=31)
    q = (q + 4).reshape(-1, 2, 4, 32)
    stored = scale + 32
    low = stored[:, :8] & 15 | (stored[:, 8:] & 15) << 4
    high = _shifted((stored >> 4).reshape(-1, 4, 4), 2)
    mask = _shifted((q >> 2).reshape(-1, 8, 32), 1)
    return _bytes(mask), _bytes(_shifted(q & 3, 2)), _bytes(low), _bytes(high), d


def _q2(x):
    scale, least, d, dmin, q = _offset(x, size=16, steps=3, most=15)
    return _bytes(scale | least << 4), _bytes(_shifted(q.reshape(-1, 2, 4, 32), 2)), d, dmin


def _q4(x):
    scale, least, d, dmin, q = _offset(x, size=32, steps=15, most=63)
    return d, dmin, _six_bits(scale, least), _nibbles(q)


def _q5(x):
    scale, least, d, dmin, q = _offset(x, size=32, steps=31, most=63)
    return d, dmin, _six_bits(scale, least), _bytes(_shifted(q >> 4, 1)), _nibbles(q & 15)


_WRITERS = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}


def _symmetric(x, steps, most):
    """Scales of 16 values each as whole numbers times d, and the values in -steps to steps - 1."""
    parts = x.reshape(len(x), 16, 16)
    wanted = np.abs(parts).max(-1) / (steps - 1)
    d = (wanted.max(-1, keepdims=True) / most).astype(np.float16)
    scale = np.rint(_over(wanted, d)).astype(np.int32)
    q = np.rint(_over(parts, (scale * d.astype(np.float32))[..., None]))
    return scale, d.view(np.uint8), np.clip(q, -steps, steps - 1).astype(np.int32)


def _offset(x, size, steps, most):
    """Scales and offsets as whole numbers times d and dmin, and the values in 0 to steps."""
    parts = x.reshape(len(x), -1, size)
    low = np.minimum(parts.min(-1), 0)
    wanted = (parts.max(-1) - low) / steps
    d = (wanted.max(-1, keepdims=True) / most).astype(np.float16)
    dmin = ((-low).max(-1, keepdims=True) / most).astype(np.float16)
    scale = np.rint(_over(wanted, d)).astype(np.int32)
    least = np.rint(_over(-low, dmin)).astype(np.int32)
    offset = (least * dmin.astype(np.float32))[..., None]
    q = np.rint(_over(parts + offset, (scale * d.astype(np.float32))[..., None]))
    q = np.clip(q, 0, steps).astype(np.int32)
    return scale, least, d.view(np.uint8), dmin.view(np.uint8), q


def _over(values, unit):
    unit = unit.astype(np.float32)
    return np.divide(values, unit, out=np.zeros_like(values), where=unit != 0)


def _shifted(values, bits):
    """The last but one axis side by side in one number, `bits` each."""
    shifts = bits * np.arange(values.shape[-2])[:, None]
    return (values << shifts).sum(-2)


def _nibbles(q):
    pairs = q.reshape(-1, 4, 2, 32)
    return _bytes(pairs[:, :, 0] | pairs[:, :, 1] << 4)


def _six_bits(scale, least):
    """Eight scales and eight offsets of six bits in twelve bytes."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = least[:, :4] | (least[:, 4:] >> 4) << 6
    third = scale[:, 4:] & 15 | (least[:, 4:] & 15) << 4
    return _bytes(np.concatenate([first, second, third], axis=1))


def _bytes(values):
    return values.reshape(len(values), -1).astype(np.uint8)
