"""The host side: ivshmem server, fd holder, regions. May import `idc` only."""
