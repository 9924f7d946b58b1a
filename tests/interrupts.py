"""Signals of a terminal for what the tests start."""

import signal


def allow() -> None:
    """Let children be ended by a terminal's signals, also where this process ignores them.

    What a shell or nohup puts in the background ignores SIGINT or SIGHUP, and so would be what the tests start, some of
    which they interrupt. A handler of this process's own is none of its children's, who get what is usual.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
