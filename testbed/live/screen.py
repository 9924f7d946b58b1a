"""The screen of `testbed top`: one table at a time, sorted, filtered, and one connection closely.

By textual: keys, resizing and the terminal's state at the end, however that comes, are a library's business. Looking is
done in a thread of its own, so that a testbed that does not answer leaves the screen alive. Depends on testbed.live.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, ClassVar, Final

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Static

from testbed.live.views import KEY, VIEWS, arrange, clock, detail, rows, view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.live.collect import BedNow, Collector
    from testbed.live.views import Column, Row, View

#: Columns and lines below which nothing can be shown.
LEAST: Final = (40, 6)
_NUMBERS: Final = {name: str(number) for number, name in enumerate((each.name for each in VIEWS), 1)}


class Top(App[None]):
    """`testbed top`.

    Args:
        collector: looks; closed by the caller.
        every: seconds between two looks.
        first: name of the view to begin with.
        sort: key of a column; empty for the view's own.
        wanted: text to filter by.

    Attributes:
        ended_by: number of the signal that ended it; 0 for none.
    """

    CSS = """
    Screen { layers: base notice; }
    #head { height: 2; }
    #table { height: 1fr; }
    #close { height: 1fr; display: none; }
    #keys { height: 1; }
    #small { layer: notice; display: none; width: 100%; height: 100%; background: $background; }
    """
    ENABLE_COMMAND_PALETTE = False
    # All with priority: they are acted on in the order in which they are typed, whatever else goes on.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, action, show=False, priority=True) for key, action in (
            *((number, f"show('{name}')") for name, number in _NUMBERS.items()),
            ("tab", "turn(1)"), ("shift+tab", "turn(-1)"), ("s", "sort(1)"), ("S", "sort(-1)"), ("r", "reverse"),
            ("slash", "filter"), ("p", "pause"), ("enter", "closely"), ("escape", "back"), ("q", "quit"),
            ("ctrl+c", "quit"))]

    def __init__(self, collector: Collector, every: float = 1.0, first: str = "vms", sort: str = "",
                 wanted: str = "") -> None:
        super().__init__()
        self._collector = collector
        self._every = every
        self._view: View = view(first)
        self._sorts = {each.name: [each.sort, False] for each in VIEWS}
        if sort:
            self._sorts[first] = [sort, False]
        self._wanted = wanted
        self._now: Sequence[BedNow] = ()
        self._before: Sequence[BedNow] = ()
        self._looked = False
        self._paused = False
        self._close = ""
        self._shown: list[str] = []
        self._columns = ""
        self._typing = False
        self.ended_by = 0

    def compose(self) -> ComposeResult:
        """The parts of the screen."""
        yield Static(id="head", markup=False)
        yield DataTable(id="table", cursor_type="row", zebra_stripes=False, cell_padding=1)
        with VerticalScroll(id="close"):
            yield Static(id="text", markup=False)
        yield Static(id="keys", markup=False)
        yield Static(id="small", markup=False)

    def on_mount(self) -> None:
        """Begin to look."""
        self._table.focus()
        self._draw()
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._end_by, number)
        self.run_worker(self._watch(), exclusive=True)

    def _end_by(self, number: int) -> None:
        self.ended_by = number
        self.exit()

    async def _watch(self) -> None:
        while True:
            if not self._paused:
                now = await asyncio.to_thread(self._collector.look)
                self._before, self._now, self._looked = self._now, now, True
                self._draw()
            await asyncio.sleep(self._every)

    # -- drawing

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#table", DataTable)

    def _draw(self) -> None:
        sort, reverse = self._sort
        found = rows(self._view, self._now, self._before)
        kept = arrange(self._view, found, sort, reverse=reverse, wanted=self._wanted)
        self._draw_head(len(found), len(kept))
        if self._close:
            lines = detail(self._close, self._now, self._before) or ["this connection is gone"]
            self.query_one("#text", Static).update("\n".join(lines))
        else:
            self._draw_table(kept)

    @property
    def _sort(self) -> tuple[str, bool]:
        sort, reverse = self._sorts[self._view.name]
        return str(sort), bool(reverse)

    def _draw_head(self, all_rows: int, kept: int) -> None:
        beds = ", ".join(f"{bed.name} ({bed.accel or 'unknown'})" for bed in self._now)
        if not self._looked:
            beds = "looking"
        elif not self._now:
            beds = "no testbed runs; waiting for one (testbed up)"
        trouble = "; ".join(f"{bed.name}: {bed.trouble}" for bed in self._now if bed.trouble)
        filtered = f"  {kept} of {all_rows} with {self._wanted!r}" if self._wanted else ""
        tabs = "  ".join(f"[{name}]" if name == self._view.name else f"{number} {name}"
                         for name, number in _NUMBERS.items())
        paused = "  PAUSED" if self._paused else ""
        self.query_one("#head", Static).update(f"{clock()}  {beds}{paused}  {trouble}".rstrip() + f"\n{tabs}{filtered}")
        keys = (f"/{self._wanted}_   enter keep  esc all rows" if self._typing else
                "esc back  p pause  q end" if self._close else
                "1-5 tab view  s S sort  r reverse  / filter  enter closely  p pause  q end   * claimed by members")
        self.query_one("#keys", Static).update(keys)

    def _draw_table(self, kept: Sequence[Row]) -> None:
        table, columns = self._table, self._visible(kept)
        sort, reverse = self._sort
        titles = [column.title + ("*" if column.claimed else "") + (("^" if reverse else "v") if column.key == sort
                                                                     else "") for column in columns]
        texts = [str(row[KEY]) for row in kept]
        at = self._shown[table.cursor_row] if 0 <= table.cursor_row < len(self._shown) else ""
        made = "|".join([self._view.name, *titles])
        if made != self._columns or texts != self._shown:
            scrolled = table.scroll_y
            table.clear(columns=True)
            for column, title in zip(columns, titles, strict=True):
                table.add_column(title, key=column.key)
            for row in kept:
                table.add_row(*(Text(column.text(row)) for column in columns), key=str(row[KEY]))
            self._columns, self._shown = made, texts
            if at in texts:
                table.move_cursor(row=texts.index(at), animate=False, scroll=False)
                table.scroll_to(y=scrolled, animate=False)
        else:
            for row in kept:
                for column in columns:
                    table.update_cell(str(row[KEY]), column.key, Text(column.text(row)), update_width=True)

    def _visible(self, kept: Sequence[Row]) -> list[Column]:
        """All columns, but for the testbed's name where there is one testbed."""
        alone = len({row["testbed"] for row in kept}) <= 1
        return [column for column in self._view.columns if not (alone and column.key == "testbed")]

    def on_resize(self, event: events.Resize) -> None:
        """Say so where nothing can be shown."""
        small = self.query_one("#small", Static)
        small.display = event.size.width < LEAST[0] or event.size.height < LEAST[1]
        small.update(f"{event.size.width}x{event.size.height}: too small, {LEAST[0]}x{LEAST[1]} at least")

    # -- keys

    def action_show(self, name: str) -> None:
        """Another view."""
        self._leave()
        self._view = view(name)
        self._draw()

    def action_turn(self, by: int) -> None:
        """The next view, or the one before."""
        names = list(_NUMBERS)
        self.action_show(names[(names.index(self._view.name) + by) % len(names)])

    def action_sort(self, by: int) -> None:
        """By the next column."""
        keys = [column.key for column in self._view.columns]
        sort, _ = self._sort
        # figures are looked at for the largest
        chosen = keys[(keys.index(sort) + by) % len(keys)]
        number = any(isinstance(row[chosen], int | float) for row in rows(self._view, self._now, self._before))
        self._sorts[self._view.name] = [chosen, number]
        self._draw()

    def action_reverse(self) -> None:
        """The other way round."""
        sort, reverse = self._sort
        self._sorts[self._view.name] = [sort, not reverse]
        self._draw()

    def action_filter(self) -> None:
        """Take in what to filter by, from the keys that follow."""
        self._typing = True
        self._draw()

    async def on_event(self, event: events.Event) -> None:
        """While a filter is typed, keys are its letters; else they do what is bound to them."""
        if not (self._typing and isinstance(event, events.Key) and not event.is_forwarded):
            await super().on_event(event)
            return
        if event.key in ("enter", "escape", "ctrl+c"):
            self._typing = False
            self._wanted = self._wanted if event.key == "enter" else ""
        elif event.key in ("backspace", "ctrl+h"):
            self._wanted = self._wanted[:-1]
        elif event.key == "ctrl+u":
            self._wanted = ""
        elif event.is_printable and event.character:
            self._wanted += event.character
        self._draw()

    def action_closely(self) -> None:
        """Look closely at a connection: of an endpoint, of a link, or of the device in that row."""
        at = self._table.cursor_row
        if self._close or not 0 <= at < len(self._shown):
            return
        key = self._shown[at]
        self._close = key if detail(key, self._now, self._before) else self._endpoint_of(key)
        if self._close:
            self._table.display, self.query_one("#close").display = False, True
            self.query_one("#close").focus()
            self._draw()

    def on_data_table_row_selected(self) -> None:
        """The same, by the mouse."""
        self.action_closely()

    def _endpoint_of(self, key: str) -> str:
        row = next((row for row in rows(self._view, self._now, self._before) if row[KEY] == key), None)
        region = row.get("region") or row.get("link") if row is not None else None
        ends = rows(view("endpoints"), self._now, self._before)
        return next((str(end[KEY]) for end in ends if row is not None and end["testbed"] == row["testbed"]
                     and str(end["endpoint"]).startswith(f"{region}/")), "")

    def action_pause(self) -> None:
        """Stop looking, or go on."""
        self._paused = not self._paused
        self._draw()

    async def action_back(self) -> None:
        """Out of the connection; or, where there is none, all rows again."""
        if not self._close:
            self._wanted = ""
        self._leave()
        self._draw()

    def _leave(self) -> None:
        if self._close:
            self._close = ""
            self._table.display, self.query_one("#close").display = True, False
            self._table.focus()
