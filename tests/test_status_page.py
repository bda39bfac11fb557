"""The server's status page: what it reads exists, and a browser shows it."""

import re
import shutil
import subprocess
import threading
import time

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from ling_kernels.generate import Spill  # noqa: E402
from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.replicas import with_label  # noqa: E402
from tests.speller import speller  # noqa: E402
from tests.test_server import BODY, call, service  # noqa: E402


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    spill = Spill(1 << 20, tmp_path_factory.mktemp("pages"), 1 << 20)
    folder = speller(tmp_path_factory.mktemp("status") / "speller")
    return service(folder, dict(spill=spill), keys=frozenset({"secret"}))


KEY = {"authorization": "Bearer secret"}


def test_the_page(shared):
    """Without a key, as /metrics; every metric that it reads is one; a name is text."""
    shared.name = "<b>speller"
    try:
        page = call(shared, "/status")
    finally:
        shared.name = "speller"
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "&lt;b&gt;speller" in page.text and "<b>speller" not in page.text and "MODEL_NAME" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    call(shared, "/v1/completions", BODY, headers=KEY)
    metrics = call(shared, "/metrics").text
    read = re.findall(r"(?:value|rate|grown)\(\"(\w+)\"", page.text)
    histograms = re.findall(r"median\(\"(\w+)\"\)", page.text)
    assert len(read) > 12 and len(histograms) == 3
    for name in [*read, *(f"{h}_count" for h in histograms)]:
        assert f"\nling_{name} " in metrics, name


@pytest.mark.parametrize("replicas", [0, 2])
def test_a_browser_shows_it(shared, tmp_path, monkeypatch, replicas):
    """Of several replicas it shows the sums."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page is checked, but not in a browser")
    text = shared.metrics.text(shared.engine)
    if replicas:
        samples = [line for line in text.splitlines() if not line.startswith("#")]
        text = "".join(f"{with_label(line, number)}\n" for line in samples for number in range(replicas))
        monkeypatch.setattr(shared.metrics, "text", lambda engine: text)
    server = uvicorn.Server(uvicorn.Config(make_app(shared), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
        shown = subprocess.run(
            [browser, *flags, f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{port}/status"],
            capture_output=True, text=True, timeout=240,
        ).stdout  # fmt: skip
    finally:
        server.should_exit = True
        thread.join(240)
    assert re.search(r'<div id="health"[^>]*class="good"[^>]*>working<', shown), shown[-3000:]
    values = {name: value for value, name in re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", shown)}
    assert values["waiting requests"] == f"0 of {1024 * (replicas or 1)}"
    assert values["tokens since the start"] == str(3 * (replicas or 1))
    assert values["of the cache's files in use"] == values["of prompts from host memory"] == "0 %"
    body = shown.split("<script>")[0]
    assert body.count("<polyline") == 4 and "NaN" not in body and "undefined" not in body
