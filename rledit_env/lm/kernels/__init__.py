"""Optional speed: faster implementations of a model's own modules, with the same results to rounding."""

