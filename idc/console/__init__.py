"""Terminals of one domain used in another, many over one connection: the device class "console".

docs/console.md is the design. The modules: `protocol` (bytes of requests), `service` (how many at a time), `output`
(what a terminal kept of its output), `terminal` (a program on a pseudo-terminal and who is attached to it), `terminals`
(all of a device, and what is asked of them), `server` (the process that has them), `device` (the two drivers), `client`
(an attachment), `tty` (a person's terminal joined to one), `screen` (that terminal).
"""
