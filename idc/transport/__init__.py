"""Carriers of frames between two endpoints: in one process, over shared memory, over TCP. `base` says what one is."""
