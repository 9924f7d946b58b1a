"""Programs and libraries that run inside a virtual machine. May import `idc` only."""
