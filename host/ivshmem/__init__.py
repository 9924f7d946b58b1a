"""The ivshmem server protocol of QEMU, its two server modes and a client."""
