"""Builds the guest kernel and root file system from Debian packages. Stands alone."""
