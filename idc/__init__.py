"""Inter-domain communication: rings, channels and transfers over shared memory. Knows nothing of QEMU."""
