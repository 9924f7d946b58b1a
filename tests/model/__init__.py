"""Models of the shared-memory protocol, and what runs them."""
