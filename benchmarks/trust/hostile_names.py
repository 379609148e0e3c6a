"""Names that want to be more than text, and every place of the package where a name is shown."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import re
import shlex
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

NAMES = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '"><svg onload=alert(4)>',
    "' onmouseover='alert(5)",
    "<!--",
    "]]>",
    "javascript:alert(6)",
    "&lt;b&gt;&amp;&#60;",
    "<a href='https://example.org'>",
    "</style><style>*{display:none}",
    "url(https://example.org/x)",
    "{{ 7 * 7 }}{% for x in y %}",
    "{0.__class__} %s %(x)s",
    "$\\frac{1}{0$",
    "$\\input{/etc/passwd}$",
    "a_b^c\\\\",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]8;;https://example.org\x1b\\link",
    "\x9b31m",
    "\r\x1b[2Kfisherviz: all is well",
    "back\x08\x08\x08",
    "bell\x07 null\x00 tab\t",
    "two\nlines",
    "\u2028line\u2029paragraph",
    "\u202egnp.exe",
    "\u2066isolated\u2069",
    "\u200b\u200e\ufeff",
    "\ud800",
    "[red]rich[/red]",
    "[link=https://example.org]rich[/link]",
    "[bold]ends in a stroke\\",
    ":warning:",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "CON",
    "a/b\\c",
    "; touch executed #",
    "$(touch executed)`touch executed`",
    "| tee executed",
    "--out=/",
    "-rf",
    "*?[a-z]",
    "~root",
    "%2e%2e%2f",
    "| a | table |\n|---|",
    "__proto__",
    "constructor",
    "toString",
    "x" * 5000,
    "e\u0301\u0302\u0303" * 40,
    "\U0001f600" * 5,
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
)
"""Each wants to be something else: markup, a script, a template, a formula, an escape sequence, a path, an option."""
TABLES = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "div", "details", "summary"}
"""What objects show of themselves in a notebook."""
PLACE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A file of a report, whose name may have letters of a method's in it, of any script."""
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
"""What a terminal obeys, or what turns or hides text in it."""


def printable(name: str) -> str:
    """The part of a name that files of text can hold."""
    return name.encode("utf-8", "replace").decode()


class Shape(HTMLParser):
    """What of a page is markup: its elements and the names of their attributes, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.markup: set[tuple[str, ...]] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element."""
        self.markup.add((tag, *sorted(name for name, _ in attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "xlink:href")]


def comparison(names: tuple[str, ...]) -> Any:
    """A comparison whose methods, layers, notes and settings bear names."""
    from tests.factory import make_comparison

    found = make_comparison(layers=names[:3], methods=names[:4], units=2, fan_in=2)
    found.meta["notes"] = list(names)
    found.meta["settings"] = {name: name for name in names}
    found.meta["command"] = shlex.join(names)
    return found


def groups() -> Iterator[tuple[str, ...]]:
    """The names that a file can hold by fours, so that a page bears several of them at once."""
    from fisherviz.support.names import unwritable

    usable = [name for name in map(printable, NAMES) if not unwritable(name)]
    for start in range(0, len(usable), 4):
        yield tuple(usable[start : start + 4]) if start + 4 <= len(usable) else tuple(usable[-4:])


def pages(folder: Path, some: int | None = None) -> tuple[int, list[str], list[Path]]:
    """Whole reports with such names.

    Returns:
        How many names stood on pages, what is wrong, and the pages.
    """
    from fisherviz.report import Section, write_report
    from fisherviz.support.names import unwritable

    plain = tuple(f"name-{k}" for k in range(4))
    known = _report(folder / "plain", [Section(plain[0], comparison(plain), plain[1])], write_report)
    tried, wrong, written = 0, [], []
    for name in filter(unwritable, map(printable, NAMES)):
        tried += 1
        try:
            write_report(folder / "refused", [Section("a title", comparison((name, *plain[:3])), "a title")])
        except ValueError as error:
            wrong += [] if unwritable(name) in str(error) else [f"{name!r} ended in {error!r}"]
        else:
            wrong.append(f"{name!r} was written, which no archive can hold")
    for number, names in enumerate([*groups()][:some]):
        out = folder / f"report-{number}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            shape, files, sheets = _report(out, [Section(names[0], comparison(names), names[1])], write_report)
        tried += len(names)
        written.append(out / "index.html")
        if odd := [file for file in files if not PLACE.fullmatch(file)]:
            wrong.append(f"{names!r} became the files {odd}")
        if extra := shape.markup - known[0].markup:
            extra = {each for each in extra if each[0] not in ("wbr", "span", "bdi", "td", "th")}
            wrong += [f"{names!r} became markup: {sorted(extra)}"] if extra else []
        wrong += [
            f"{names!r} became the address {a[:80]!r}" for a in shape.addresses if not a.startswith(("#", "data:"))
        ]
        wrong += [f"{names!r} became a formula: {cell!r}" for cell in sheets if _formula(cell)]
        wrong += [f"{names!r}: matplotlib said {w.message}" for w in said if "parse" in str(w.message).lower()]
    return tried, wrong, written


def _report(out: Path, sections: list[Any], write: Callable[..., Path]) -> tuple[Shape, set[str], list[str]]:
    write(out, sections)
    shape = Shape((out / "index.html").read_text(encoding="utf-8"))
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    cells = []
    for address in shape.addresses:
        if address.startswith("data:text/csv"):
            text = base64.b64decode(address.partition(",")[2]).decode()
            cells += [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    return shape, files, cells


def _formula(cell: str) -> bool:
    if not cell or cell[0] not in "=+-@\t\r":
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def browsed(written: list[Path]) -> dict[str, Any] | None:
    """The pages in a browser; None where there is none.

    Returns:
        How many were opened, and every dialog, request and complaint.
    """
    import shutil

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if path is None:
        return None
    heard: list[str] = []
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        for each in written:
            page = browser.new_page()
            page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            page.on("console", lambda message: heard.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: heard.append(f"error: {error}"))
            page.on("request", partial(_noted, heard, each.as_uri()))
            page.goto(each.as_uri())
            for select in page.locator("select").all()[:3]:
                select.select_option(index=0)
            page.mouse.move(300, 300)
            page.close()
        # whatever came into a page, its policy lets nothing out; without one the same attempts arrive
        free = written[0].with_name("free.html")
        free.write_text("<!DOCTYPE html><title>x</title><body></body>")
        reached = [_reached(browser, place) for place in (written[0], free)]
        browser.close()
    return {
        "pages": len(written), "heard": heard, "attempts": len(ATTEMPTS), "reached": reached[0],
        "reached without a policy": reached[1],
    }  # fmt: skip


def _reached(browser: Any, place: Path) -> int:
    """How many of the attempts reach a server of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        count = 0
        for attempt in ATTEMPTS:
            page = browser.new_page()
            page.goto(place.as_uri())
            page.evaluate(attempt.replace("PORT", str(server.getsockname()[1])))
            arrived = False
            with contextlib.suppress(TimeoutError):
                while True:  # a browser opens connections on which it asks for nothing
                    with server.accept()[0] as connection:
                        connection.settimeout(0.3)
                        with contextlib.suppress(TimeoutError, ConnectionError):
                            arrived |= bool(connection.recv(1))
            count += arrived
            page.close()
    return count


def _noted(heard: list[str], own: str, request: Any) -> None:
    if not request.url.startswith(("data:", "blob:")) and request.url.split("#")[0] != own:
        heard.append(f"request: {request.url}")


ATTEMPTS = (
    "() => { const i = document.createElement('img'); i.src = 'http://127.0.0.1:PORT/'; document.body.append(i); }",
    "() => { const s = document.createElement('script'); s.src = 'http://127.0.0.1:PORT/'; document.body.append(s); }",
    "() => { const f = document.createElement('iframe'); f.src = 'http://127.0.0.1:PORT/'; document.body.append(f); }",
    "() => { const l = document.createElement('link'); l.rel = 'stylesheet'; l.href = 'http://127.0.0.1:PORT/a.css'; "
    "document.head.append(l); }",
    "() => { fetch('http://127.0.0.1:PORT/').catch(() => 0); }",
    "() => { try { new WebSocket('ws://127.0.0.1:PORT/'); } catch (e) {} }",
    "() => { try { new EventSource('http://127.0.0.1:PORT/'); } catch (e) {} }",
    "() => { navigator.sendBeacon('http://127.0.0.1:PORT/', 'x'); }",
    "() => { const x = new XMLHttpRequest(); x.open('GET', 'http://127.0.0.1:PORT/'); try { x.send(); } catch (e) {} }",
    "() => { try { new Worker('http://127.0.0.1:PORT/w.js'); } catch (e) {} }",
    "() => { const f = document.createElement('form'); f.action = 'http://127.0.0.1:PORT/'; document.body.append(f); "
    "f.submit(); }",
    "() => { const o = document.createElement('object'); o.data = 'http://127.0.0.1:PORT/'; document.body.append(o); }",
    "() => { const v = document.createElement('video'); v.src = 'http://127.0.0.1:PORT/'; document.body.append(v); }",
    "() => { document.body.style.backgroundImage = 'url(http://127.0.0.1:PORT/b.png)'; }",
    "() => { const s = document.createElement('style'); s.textContent = '@import \"http://127.0.0.1:PORT/c.css\"'; "
    "document.head.append(s); }",
)
"""What a page would do to tell somebody that it has been opened."""

COMMANDS: tuple[Callable[[str], tuple[str, ...]], ...] = (
    lambda name: ("report", "--model", name, "--data", "digits"),
    lambda name: ("report", "--model", f"{name}:build", "--data", "digits"),
    lambda name: ("report", "--data", name),
    lambda name: ("report", "--data", f"digits:{name}"),
    lambda name: ("report", "--methods", name),
    lambda name: ("report", "--metrics", name),
    lambda name: ("report", "--kind", name),
    lambda name: ("report", "--likelihood", name),
    lambda name: ("report", "--device", name),
    lambda name: ("report", "--against", name),
    lambda name: ("report", "--weights", name),
    lambda name: ("report", "--seed", name),
    lambda name: ("report", f"--{name}"),
    lambda name: ("train", "--dataset", name),
    lambda name: ("train", "--model", name),
    lambda name: ("train", "--optimizer", name),
    lambda name: ("train", "--optimizer-option", name),
    lambda name: ("train", "--optimizer-option", f"{name}=1"),
    lambda name: ("train", "--task", name),
    lambda name: ("train", "--config", name),
    lambda name: ("sweep", "--over", name),
    lambda name: ("sweep", "--over", f"{name}=[1]", "--dataset", name),
    lambda name: ("sweep", "--preset", name),
    lambda name: ("sweep", "--sampler", name, "--over", "lr=[1]"),
    lambda name: ("data", "check", name),
    lambda name: ("data", "fetch", name),
    lambda name: ("data", name),
    lambda name: ("papers", "--only", name),
    lambda name: ("papers", "--scale", name),
    lambda name: (name,),
)
"""Every option of every subcommand that takes a name, wrong by it."""


def told(name: str, command: Callable[[str], tuple[str, ...]]) -> list[str]:
    """What is wrong with what a terminal shows of a command that fails by a name."""
    from typer.testing import CliRunner

    from fisherviz.cli import app

    given = command(name)
    result = CliRunner().invoke(app, list(given))
    wrong = []
    if found := STEERING.search(result.output):
        wrong.append(f"{given!r} printed {found[0]!r}")
    if result.exit_code not in (0, 1, 2) or "Traceback" in result.output:
        wrong.append(f"{given!r} left with {result.exit_code}: {result.output[-200:]!r}")
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        wrong.append(f"{given!r} raised {type(result.exception).__name__}: {str(result.exception)[:100]}")
    return wrong


def terminals(names: tuple[str, ...], every: int = 1) -> tuple[int, list[str]]:
    """Each name with every so-many-th of the commands, others for each, so that each command meets many names."""
    tried, wrong = 0, []
    for number, name in enumerate(names):
        for command in COMMANDS[number % every :: every]:
            tried += 1
            wrong += told(name, command)
    return tried, wrong


def shown(names: tuple[str, ...]) -> tuple[int, list[str]]:
    """What objects show of themselves in notebooks and terminals, the tables of commands, and names in pictures."""
    from fisherviz.commands import terminal
    from fisherviz.commands.again import command_of
    from fisherviz.commands.job import Job
    from fisherviz.support.names import no_formula, shortened

    tried, wrong = 0, []
    for name in names:
        tried += 1
        written = printable(name).replace("\0", "")  # which no comparison takes
        found = comparison((written, f"{written}b", f"{written}c", f"{written}d"))
        for text in (found._repr_html_(), found.summary()._repr_html_()):
            if extra := {each[0] for each in Shape(text).markup} - TABLES:
                wrong.append(f"{name!r} became {extra} in a notebook")
        for text in (repr(found), str(found), *shortened([name, "other"], 12)):
            if STEERING.search(text):
                wrong.append(f"{name!r} steers a terminal by {text[:60]!r}")
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogatepass") as stream:
            before, sys.stdout = sys.stdout, stream
            try:
                column = terminal.Column(name, [name, name], frozenset({1}), right=False)
                terminal.print_table([column, terminal.Column("x", ["1", "2"])], name, name)
                terminal.say(name)
            finally:
                sys.stdout = before
            stream.seek(0)
            text = stream.read()
            if STEERING.search(text):
                wrong.append(f"{name!r} steers a terminal from a table")
            if "rich" in name and name.replace("\\", "") not in text.replace("\\", "").replace("\n", ""):
                wrong.append(f"{name!r} was taken for a style")
        if "\x00" not in name and "\ud800" not in name:
            words = shlex.split(command_of(Job(model=name, data=name, layers=(name,), targets=name)))
            if words[words.index("--model") + 1] != name or words.count(name) < 3:
                wrong.append(f"{name!r} does not come back out of the command")
        if _formula(no_formula(name)):
            wrong.append(f"{name!r} is a formula")
    return tried, wrong
