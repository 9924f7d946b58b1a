"""Merges traces of several domains on one clock, into a file that Perfetto opens; see docs/trace.md."""
