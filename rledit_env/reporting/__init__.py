"""Results to look at: pages, pictures and tables."""

