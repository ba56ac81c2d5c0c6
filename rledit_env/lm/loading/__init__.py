"""Names to weights on disk, and weights on disk to a frozen model."""

