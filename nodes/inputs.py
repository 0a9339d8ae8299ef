"""The limits of a node's schema, for values that ComfyUI does not check against it.

ComfyUI leaves the numbers alone that a node's `validate_inputs` names, and those that come through
a link. What a schema says holds for them too, from here and for every node alike.
"""

import math


def limit_error(node, **values) -> str | None:
    """What is wrong with the first value outside of its input's limits, or None.

    node: its class. values: by input; None is not known yet.
    """
    # Not GET_SCHEMA, which writes to the class: ComfyUI runs nodes on a locked copy of it.
    for entry in node.define_schema().inputs:
        value = values.get(entry.id)
        low, high = (getattr(entry, limit, None) for limit in ("min", "max"))
        if not isinstance(value, (int, float)) or (low is None and high is None):
            continue
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not low <= value <= high:  # NaN too
            kind = "a whole number" if isinstance(entry.default, int) else "a number"
            return f"{entry.id} is {value!r}; expected {kind} from {low} to {high}."
    return None


def check_limits(node, **values) -> None:
    """Raise ValueError for a value outside of its input's limits."""
    if (error := limit_error(node, **values)) is not None:
        raise ValueError(error)


def verdict(node, check, **values):
    """The answer of a `validate_inputs`: True, or what is wrong with a value.

    check: raises ValueError with more to say than a limit, and goes first.
    """
    try:
        check()
    except ValueError as error:
        return str(error)
    return limit_error(node, **values) or True
