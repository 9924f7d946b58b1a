"""Looking on while a testbed runs: what `testbed top` shows and `testbed metrics` exports. See docs/top.md."""
