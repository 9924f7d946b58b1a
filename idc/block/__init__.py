"""Block devices: /dev/nbdN in the front end's VM, an image in the back end's. docs/block.md is the design.

    protocol   bytes of requests and of the geometry              no I/O
    image      images and overlays, carried out by image.c        files
    lease      who uses an image, and how a former one is ended   files, processes
    netlink    the kernel's nbd, by generic netlink               one socket
    nbd        the kernel's side of a connection: a byte stream   no I/O
    back, front, device                                           the device class
"""
