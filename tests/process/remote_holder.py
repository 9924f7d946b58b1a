"""python remote_holder.py ADDRESS share|receive: uses each reference that comes in a message, and says so.

Shared pages are held until told "release"; received bytes are received again and again.
"""

from __future__ import annotations

import sys

from idc.buffers import process_memory
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, Resources
from idc.remote import Borrowed, Exports, Regions, Remote, RemoteBuffer
from idc.transport.address import open_port


class Holder(Client):
    """Does what it is told to with what it gets."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.held: list[Borrowed] = []
        self.bytes = 0

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        message.complete()
        if message.body == b"release":
            for borrowed in self.held:
                borrowed.release()
            self.held.clear()
            return
        remote = endpoint.remote(message.body)
        if self.how == "share":
            remote.share(self.got)
        else:
            self.again(remote)

    def got(self, completion: Completion, borrowed: Borrowed | None) -> None:
        if borrowed is not None:
            self.held.append(borrowed)
        say(f"{completion.result.value} {borrowed.strategy.value if borrowed else ''}".strip())

    def again(self, remote: RemoteBuffer) -> None:
        def done(completion: Completion) -> None:
            say(f"{completion.result.value} {remote.route.value if remote.route else ''}".strip())
            if not completion.error:
                self.again(remote)

        remote.receive_from(process_memory(bytearray(len(remote))), done)


def say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main() -> None:
    address, how = sys.argv[1:]
    port = open_port(address)
    remote = Remote(Exports(0, 0, 0, regions=Regions(*port.regions)))
    endpoint = Endpoint(port, Holder(how), Resources(remote=remote), "owner")
    while True:
        endpoint.pump(1.0)


if __name__ == "__main__":
    main()
