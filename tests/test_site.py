"""The built site on a phone, in a real browser: no page is wider than the screen, tables can be read, the menu opens, the search from it finds.

`bash/docs.sh` runs these on what it built, and says where that is by SEDD_SITE; other runs of the tests skip them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
SITE = os.environ.get("SEDD_SITE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(SITE is None, reason="SEDD_SITE names no built site (bash/docs.sh)"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

VISITOR = """<!doctype html><title>visitor</title>
<iframe style="width: 390px; height: 844px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
const go = page => new Promise(done => { frame.onload = done; frame.src = page; });
const until = async what => {
  for (let tries = 0; tries < 300; tries++) {
    const found = what(frame.contentDocument);
    if (found) return found;
    await new Promise(done => setTimeout(done, 100));
  }
  return null;
};
const seen = name => page => [...page.querySelectorAll(name)].find(one => one.checkVisibility());
async function visit() {
  const widths = {}, narrow = {};
  for (const page of PAGES) {
    await go("/" + page);
    widths[page] = frame.contentDocument.documentElement.scrollWidth;
    narrow[page] = [...frame.contentDocument.querySelectorAll("td code")].map(one => [one.textContent, one.getBoundingClientRect().width])
      .filter(([text, width]) => text.length > 8 && width < 50).map(([text]) => text);
    narrow[page].push(...[...frame.contentDocument.querySelectorAll("dt > strong")].map(one => [one.textContent, one.getBoundingClientRect().height])
      .filter(([text, height]) => !text.includes(" ") && height > 40).map(([text]) => text));
  }
  await go("/index.html");
  (await until(seen(".primary-toggle"))).click();
  const menu = await until(page => page.querySelector("dialog[open]"));
  const links = menu ? menu.querySelectorAll("a[href]").length : 0;
  const button = menu && await until(() => seen(".search-button-field, .search-button")(menu));
  if (button) button.click();
  const field = button && await until(seen("dialog[open] input[name=q]"));
  let found = [];
  if (field) {
    const loaded = new Promise(done => { frame.onload = done; });
    field.value = "impute";
    field.form.requestSubmit();
    await loaded;
    await until(page => page.querySelectorAll("#search-results li a").length > 4);
    found = [...frame.contentDocument.querySelectorAll("#search-results li a")].map(link => link.textContent);
  }
  return {widths, narrow, links, found};
}
visit().catch(error => ({error: String(error)})).then(all => fetch("/visited", {method: "POST", body: JSON.stringify(all)}));
</script>"""


class Server(ThreadingHTTPServer):
    """The site, a page that visits it, and what that page found."""

    found: dict[str, Any]
    done: threading.Event
    visitor: bytes


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/visitor":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.visitor)

    def do_POST(self) -> None:
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    assert BROWSER and SITE
    folder, site = tmp_path_factory.mktemp("browser"), Path(SITE).resolve()
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        server.found, server.done = {}, threading.Event()
        server.visitor = VISITOR.replace("PAGES", json.dumps(pages)).encode()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--window-size=800,900", "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            [*words, f"http://127.0.0.1:{server.server_port}/visitor"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        try:
            assert server.done.wait(800), "the browser did not say what it saw"
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    assert "error" not in server.found, server.found
    return server.found


def test_no_page_is_wider_than_a_phone(visited: dict[str, Any]) -> None:
    assert len(visited["widths"]) > 50
    assert not {page: width for page, width in visited["widths"].items() if width > 390}


def test_no_name_in_a_table_or_a_list_is_broken_after_every_letter_or_two(visited: dict[str, Any]) -> None:
    assert not {page: names for page, names in visited["narrow"].items() if names}


def test_the_menu_opens_on_a_phone(visited: dict[str, Any]) -> None:
    assert visited["links"] > 10


def test_the_search_in_the_menu_finds_pages(visited: dict[str, Any]) -> None:
    assert any("impute" in title for title in visited["found"])
