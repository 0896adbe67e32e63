"""fetch from servers that fail, lie or change: each named, and nothing of it accepted."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import httpx2
import pytest

import llm_sepweight
from llm_sepweight import WeightError, _download, _remote, fetch
from llm_sepweight._catalog import JSON_LIMIT

Trick = Callable[..., object]
BOMB = gzip.compress(bytes(32 << 20))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download, "WINDOW", 4096)
    monkeypatch.setattr(_remote, "FIRST_PAUSE", 0.01)


@pytest.fixture
def split(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


@pytest.fixture(params=["checkpoint", "split"])
def source(request, checkpoint, split) -> Path:
    return {"checkpoint": checkpoint, "split": split}[request.param]


def wants_weights(request) -> bool:
    """Whether this asks for a range beyond the first one of a file of weights."""
    return request.name.endswith(".safetensors") and request.headers["Range"] not in (None, "bytes=0-7")


def span(request) -> tuple[int, int]:
    """Start and size of the range that is asked for."""
    start, stop = request.headers["Range"].removeprefix("bytes=").split("-")
    return int(start), int(stop) + 1 - int(start)


def without_ranges(request) -> object:
    if "Range" in request.headers:
        request.answer(200, (request.server.directory / request.name).read_bytes())
        return True
    return False


def from_now_on_without_ranges(request) -> object:
    if wants_weights(request):
        del request.headers["Range"]
    return False


def only_if_asked_for_weights(answer: Callable[..., None]) -> Trick:
    return lambda request: wants_weights(request) and (answer(request), True)[1]


def good(request, **changed: str | None) -> tuple[bytes, dict[str, str | None]]:
    """The body and headers of the right answer, with some headers changed."""
    found: list = []
    answer, request.answer = request.answer, lambda status, body=b"", **headers: found.append((body, headers))
    request.serve()
    request.answer = answer
    [(body, headers)] = found
    return body, {**headers, **changed}


def another_range(request) -> None:
    _, nbytes = span(request)
    size = (request.server.directory / request.name).stat().st_size
    body, headers = good(request, Content_Range=f"bytes 0-{nbytes - 1}/{size}")
    request.answer(206, body, **headers)


def no_range_said(request) -> None:
    body, headers = good(request, Content_Range=None)
    request.answer(206, body, **headers)


def another_size(request) -> None:
    start, nbytes = span(request)
    body, headers = good(request, Content_Range=f"bytes {start}-{start + nbytes - 1}/999999999")
    request.answer(206, body, **headers)


def more_than_asked(request) -> None:
    body, headers = good(request)
    request.answer(206, body + b"more", **headers)


def endless(request) -> None:
    body, headers = good(request, Content_Length=None, Transfer_Encoding="chunked")
    request.answer(206, b"", **headers)
    for _ in range(1000):
        request.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))


def compressed(request) -> None:
    body, headers = good(request, Content_Encoding="gzip")
    request.answer(206, body, **headers)


def another_version(request) -> None:
    body, headers = good(request, ETag='"another"')
    request.answer(206, body, **headers)


def closing_early(request) -> None:
    body, headers = good(request)
    request.answer(206, body[:-1], **{**headers, "Content_Length": str(len(body))})
    request.close_connection = True


def silent(request) -> None:
    time.sleep(1)
    request.close_connection = True


def trickling(request) -> None:
    body, headers = good(request)
    request.answer(206, body[:1], **{**headers, "Content_Length": str(len(body))})
    for i in range(1, min(20, len(body))):
        request.wfile.write(body[i : i + 1])
        time.sleep(0.05)


def trickling_headers(request) -> None:
    request.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-More: ")
    for _ in range(30):
        request.wfile.write(b"x")
        time.sleep(0.05)
    request.wfile.write(b"\r\n")
    request.serve()


def status(number: int) -> Callable[..., None]:
    return lambda request: request.answer(number)


def in_a_circle(request) -> None:
    request.answer(302, Location=request.path)


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (without_ranges, "the server does not do ranges .*safetensors"),
        (from_now_on_without_ranges, "the server does not do ranges"),
        (only_if_asked_for_weights(another_range), "the server answers 'bytes 0-.*not to be trusted with ranges"),
        (only_if_asked_for_weights(no_range_said), "the server answers '', "),
        (only_if_asked_for_weights(another_size), "999999999 bytes now"),
        (only_if_asked_for_weights(more_than_asked), "asked for bytes .* the server answers"),
        (only_if_asked_for_weights(endless), "the server sends more than the .* bytes that there should be"),
        (only_if_asked_for_weights(compressed), "encoded as gzip"),
        (only_if_asked_for_weights(another_version), "changed at the source while it was read"),
        (only_if_asked_for_weights(closing_early), "the connection failed: .*; given up after 2 tries"),
        (only_if_asked_for_weights(silent), "no answer for 0.3 s; given up after 2 tries"),
        (only_if_asked_for_weights(trickling_headers), "no answer for 0.3 s; given up after 2 tries"),
        (only_if_asked_for_weights(trickling), "the server stalls: .* bytes in 0.3 s; given up after 2 tries"),
        (only_if_asked_for_weights(status(500)), "500 Internal Server Error; given up after 2 tries.*Try again later"),
        (only_if_asked_for_weights(status(503)), "503 Service Unavailable; given up after 2 tries"),
        (only_if_asked_for_weights(status(429)), "429 Too Many Requests; given up after 2 tries"),
        (only_if_asked_for_weights(status(401)), "401 Unauthorized .*headers="),
        (only_if_asked_for_weights(status(403)), "403 Forbidden .*headers="),
        (only_if_asked_for_weights(status(404)), "404 Not Found .*a file may be missing there"),
        (only_if_asked_for_weights(status(416)), "shorter than it was said"),
        (only_if_asked_for_weights(status(418)), "418 I'm a Teapot"),
        (only_if_asked_for_weights(in_a_circle), "redirects more than 5 times"),
    ],
)  # fmt: skip
def test_what_a_server_does_wrong_is_named_and_not_accepted(source, serve, layout, tmp_path, trick, message):
    server = serve(source)
    server.trick = trick
    with pytest.raises(WeightError, match=message) as error:
        fetch(server.url, "0:2", tmp_path / "node", layout=layout, timeout=0.3, retries=1)
    assert error.value.file is not None
    assert error.value.file.startswith(server.url)
    assert not list(tmp_path.glob("node/[!.]*"))


def flooding(request) -> None:
    for _ in range(1000):
        request.wfile.write(b"%x\r\n%s\r\n" % (1 << 16, bytes(1 << 16)))


def bomb(request) -> None:
    request.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BOMB), BOMB))


def dripping(request) -> None:
    for _ in range(100):
        request.wfile.write(b"1\r\nx\r\n")
        time.sleep(0.05)


@pytest.mark.parametrize(("body", "headers"), [(flooding, {}), (bomb, {"Content_Encoding": "gzip"}), (dripping, {})])
def test_the_body_of_a_redirect_takes_neither_memory_nor_time(split, serve, tmp_path, body, headers):
    server, other = serve(split), serve(split)

    def trick(request) -> bool:
        chunked = {"Content_Length": None, "Transfer_Encoding": "chunked", **headers}
        request.answer(302, Location=f"{other.url}/{request.name}", **chunked)
        body(request)
        return True

    server.trick = trick
    tracemalloc.start()
    start = time.monotonic()
    fetch(server.url, "0:1", tmp_path / "node", timeout=1, retries=0)
    took, (_, most) = time.monotonic() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 4
    assert most < 16 << 20
    assert (tmp_path / "node/mid.00000.safetensors").read_bytes() == (split / "mid.00000.safetensors").read_bytes()


def test_a_redirect_that_drips_what_it_promised_is_given_up(split, serve, tmp_path):
    server = serve(split)

    def trick(request) -> bool:
        request.answer(302, b"x", Location="/elsewhere", Content_Length="1000")
        for _ in range(20):
            request.wfile.write(b"x")
            time.sleep(0.05)
        return True

    server.trick = trick
    with pytest.raises(WeightError, match="the server stalls: .* bytes in 0.3 s"):
        fetch(server.url, "0:1", tmp_path / "node", timeout=0.3, retries=0)


def test_a_redirect_costs_no_new_connection(split, serve, tmp_path):
    server, other, connections = serve(split), serve(split), set()

    def trick(request) -> bool:
        connections.add(request.client_address)
        return request.answer(302, b"Found", Location=f"{other.url}/{request.name}") is None

    server.trick = trick
    fetch(server.url, "f", tmp_path / "node", connections=1)
    assert len(server.requests) > 10
    assert len(connections) == 2  # that of the thread that plans, that of the one that reads


@pytest.mark.parametrize("name", ["sepweight.json", "mid.00001.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("number", [403, 404])
def test_whichever_file_a_server_withholds_is_named(split, serve, layout, tmp_path, name, number):
    server = serve(split)
    server.trick = lambda request: request.name == name and request.answer(number) is None
    with pytest.raises(WeightError) as error:
        fetch(server.url, "0:2", tmp_path / "node", retries=0)
    where = server.url if (name, number) == ("sepweight.json", 404) else f"{server.url}/{name}"
    assert error.value.file == where
    assert not (tmp_path / "node/sepweight.json").exists()
    assert not any(wants_weights(request) for request in server.requests) or name.endswith(".safetensors")


def test_a_file_that_says_it_is_no_small_one_stays_where_it_is(checkpoint, serve, layout, tmp_path):
    server = serve(checkpoint)

    def trick(request) -> bool:
        request.close_connection = request.name == "vocab.txt"
        return request.name == "vocab.txt" and request.answer(200, Content_Length=str(JSON_LIMIT + 1)) is None

    server.trick = trick
    fetch(server.url, "0:1", tmp_path / "node", layout=layout)
    assert not (tmp_path / "node/vocab.txt").exists()


def ask_for_all(server, trick: Trick, destination: Path, layout, error: type[BaseException]) -> None:
    """Fetch from a server that then answers no more, until this error; it comes before the server has to let go."""
    go_on = threading.Event()

    def hang(request) -> bool:
        if not trick(request):
            return False
        go_on.wait(20)
        request.close_connection = True
        return True

    server.trick = hang
    start = time.monotonic()
    with pytest.raises(error):
        fetch(server.url, "f", destination, layout=layout)
    assert time.monotonic() - start < 10
    go_on.set()


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also where a shell has it ignored, as for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("hangs", [wants_weights, lambda request: "Range" in request.headers])
def test_a_fetch_that_is_interrupted_waits_for_no_server(source, serve, layout, tmp_path, hangs):
    asked, main = itertools.count(1), threading.get_ident()

    def trick(request) -> bool:
        if hangs(request) and next(asked) == 2:
            time.sleep(0.1)  # the main thread waits for what it asked for
            signal.pthread_kill(main, signal.SIGINT)
        return hangs(request)

    ask_for_all(serve(source), trick, tmp_path / "node", layout, KeyboardInterrupt)


def test_a_fetch_that_fails_waits_for_no_server(split, serve, layout, tmp_path):
    def trick(request) -> bool:
        if wants_weights(request) and (request.name, span(request)[0]) == ("begin.safetensors", 0):
            time.sleep(0.1)  # others have been asked for
            return request.answer(404) is not None
        return wants_weights(request)

    ask_for_all(serve(split), trick, tmp_path / "node", layout, WeightError)


def fails_at_first(times: int, answer: Callable[..., None]) -> Trick:
    failed: dict[str, int] = {}

    def trick(request) -> bool:
        asked = f"{request.name} {request.headers['Range']}"
        failed[asked] = failed.get(asked, 0) + 1
        if failed[asked] > times:
            return False
        answer(request)
        return True

    return trick


def resetting(request) -> None:
    request.close_connection = True


@pytest.mark.parametrize("answer", [status(503), status(429), status(408), resetting])
def test_a_server_that_recovers_is_asked_again(source, split, serve, layout, tmp_path, answer):
    server = serve(source)
    server.trick = fails_at_first(2, answer)
    fetch(server.url, "0:2", tmp_path / "node", layout=layout, retries=2)
    for part in ("mid.00000.safetensors", "mid.00001.safetensors"):
        assert (tmp_path / "node" / part).read_bytes() == (split / part).read_bytes()


def test_weights_that_stop_half_way_are_asked_for_again(source, split, serve, layout, tmp_path):
    server = serve(source)
    recovers = fails_at_first(1, closing_early)
    server.trick = lambda request: wants_weights(request) and recovers(request)
    fetch(server.url, "0:2", tmp_path / "node", layout=layout)
    assert (tmp_path / "node/mid.00001.safetensors").read_bytes() == (split / "mid.00001.safetensors").read_bytes()


def test_a_pause_that_the_server_asks_for_is_kept_and_one_too_long_is_not(split, serve, tmp_path):
    server = serve(split)
    busy = fails_at_first(1, lambda request: request.answer(503, Retry_After="1"))
    server.trick = lambda request: request.name == "config.json" and busy(request)
    start = time.monotonic()
    fetch(server.url, "0:1", tmp_path / "node", connections=1)
    assert time.monotonic() - start > 1
    server.trick = fails_at_first(1, lambda request: request.answer(503, Retry_After="86400"))
    with pytest.raises(WeightError, match="503 Service Unavailable; given up after 1 tries"):
        fetch(server.url, "1:2", tmp_path / "node")


def test_a_pause_may_be_asked_for_by_a_date(split, serve, tmp_path):
    def busy_for(seconds: float) -> Trick:
        return fails_at_first(
            1, lambda request: request.answer(503, Retry_After=formatdate(time.time() + seconds, usegmt=True))
        )

    server = serve(split)
    server.trick = busy_for(86400)
    with pytest.raises(WeightError, match="503 Service Unavailable; given up after 1 tries"):
        fetch(server.url, "0:1", tmp_path / "node")
    busy = busy_for(2)
    server.trick = lambda request: request.name == "config.json" and busy(request)
    start = time.monotonic()
    fetch(server.url, "0:1", tmp_path / "node", connections=1)
    assert time.monotonic() - start > 0.9  # a date has whole seconds


@pytest.mark.parametrize("said", ["Sat, 01 Jan 2000 00:00:00 GMT", "soon", "", "-1", "1.5", "9" * 20])
def test_a_pause_that_cannot_be_is_an_ordinary_one(split, serve, tmp_path, said):
    server = serve(split)
    server.trick = fails_at_first(1, lambda request: request.answer(503, Retry_After=said))
    fetch(server.url, "0:1", tmp_path / "node")


@pytest.mark.parametrize("answer", [status(503), status(429), resetting])
def test_a_hub_that_recovers_is_asked_again(serve, tmp_path, monkeypatch, answer):
    hub = serve(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.removesuffix("/model"))
    fails = fails_at_first(2, answer)
    found = json.dumps({"id": "owner/name", "sha": "c0ffee", "siblings": [{"rfilename": "config.json"}]}).encode()
    hub.trick = lambda request: fails(request) or request.answer(200, found) is None
    with pytest.raises(WeightError, match="hub.*; given up after 2 tries.*hf://owner/name"):
        fetch("hf://owner/name", "f", tmp_path / "node", retries=1)
    with _remote.open_remote("hf://owner/name", headers={}, timeout=5, retries=1) as remote:
        assert remote.names() == ["config.json"]


def test_a_file_that_changes_between_two_ranges_is_never_pieced_together(source, split, serve, layout, tmp_path):
    server = serve(source)
    count = 0

    def change(request) -> bool:
        nonlocal count
        count += wants_weights(request)
        if count == 5:
            for path in source.glob("*.safetensors"):
                data = bytearray(path.read_bytes())
                data[-8:] = b"changed!"
                path.write_bytes(data)
        return False

    server.trick = change
    with pytest.raises(WeightError, match="changed at the source while it was read"):
        fetch(server.url, "f", tmp_path / "node", layout=layout, connections=1)
    assert not (tmp_path / "node/sepweight.json").exists()


def test_a_file_that_changes_on_a_disk_that_is_the_source_is_noticed(source, layout, tmp_path):
    def change(done: int, total: int) -> None:
        if done > total // 2:
            for path in source.glob("*.safetensors"):
                data = bytearray(path.read_bytes())
                data[-8:] = b"changed!"
                path.write_bytes(data)

    with pytest.raises(WeightError, match="changed at the source while it was read"):
        fetch(source, "f", tmp_path / "node", layout=layout, progress=change)
    assert not (tmp_path / "node/sepweight.json").exists()


def test_where_no_version_is_told_a_checkpoint_is_refused_and_checksums_do(checkpoint, split, serve, layout, tmp_path):
    def trick(request) -> bool:
        if not (request.server.directory / request.name).exists():
            return False
        body, headers = good(request, ETag=None)
        request.answer(206 if "Range" in request.headers else 200, body, **headers)
        return True

    old, new = serve(checkpoint), serve(split)
    old.trick = new.trick = trick
    with pytest.raises(WeightError, match="neither ETag nor Last-Modified"):
        fetch(old.url, "0:1", tmp_path / "node", layout=layout)
    fetch(new.url, "0:1", tmp_path / "node")


@pytest.mark.parametrize("destination", ["new", "with this config.json"])
def test_the_config_that_is_written_is_the_one_that_the_plan_went_by(checkpoint, serve, layout, tmp_path, destination):
    server, config = serve(checkpoint), (checkpoint / "config.json").read_bytes()
    if destination != "new":
        (tmp_path / "node").mkdir()
        (tmp_path / "node/config.json").write_bytes(config)

    def trick(request) -> bool:
        if wants_weights(request):
            (checkpoint / "config.json").write_text('{"another": 1}')
        return False

    server.trick = trick
    fetch(server.url, "0:1", tmp_path / "node", layout=layout)
    assert (tmp_path / "node/config.json").read_bytes() == config
    with llm_sepweight.open(tmp_path / "node") as weights:
        assert weights.config == json.loads(config)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_small_file_of_which_nothing_tells_the_end_is_refused(checkpoint, serve, layout, tmp_path, chunked):
    server = serve(checkpoint)

    def trick(request) -> bool:
        if request.name != "tokenizer.json":
            return False
        coding = "chunked" if chunked else None
        request.answer(200, b"2\r\n{}\r\n0\r\n\r\n" if chunked else b"{", Content_Length=None, Transfer_Encoding=coding)
        request.close_connection = True
        return True

    server.trick = trick
    if chunked:
        fetch(server.url, "0:1", tmp_path / "node", layout=layout)
        assert (tmp_path / "node/tokenizer.json").read_bytes() == b"{}"
    else:
        with pytest.raises(WeightError, match="does not say how long it is.*tokenizer.json"):
            fetch(server.url, "0:1", tmp_path / "node", layout=layout)


def test_a_flipped_bit_is_found_and_nothing_of_the_file_stays(split, serve, tmp_path):
    file = split / "mid.00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightError, match=r"the checksum xxh3_128:.*manifest \(file http.*, part mid.00001\)"):
        fetch(serve(split).url, "0:2", tmp_path / "node")
    left = {path.name for path in (tmp_path / "node").iterdir()}
    assert not {name for name in left if "mid.00001" in name}
    assert "sepweight.json" not in left


def test_a_file_of_another_size_than_the_manifest_says_is_refused_before_it_is_read(split, serve, tmp_path):
    with (split / "mid.00001.safetensors").open("ab") as file:
        file.write(b"more")
    server = serve(split)
    with pytest.raises(WeightError, match="in the manifest .*mid.00001"):
        fetch(server.url, "0:2", tmp_path / "node")
    assert not [request for request in server.requests if wants_weights(request)]


def test_a_small_file_that_is_damaged_is_refused(split, serve, tmp_path):
    (split / "tokenizer.json").write_text("{ }")
    with pytest.raises(WeightError, match="not those of the manifest .*tokenizer.json"):
        fetch(serve(split).url, "0:1", tmp_path / "node")
    assert not (tmp_path / "node/sepweight.json").exists()


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\0" * 8, b"version "])
def test_a_shard_whose_header_is_none_is_refused(checkpoint, serve, layout, tmp_path, header):
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(header + shard.read_bytes()[8:])
    server = serve(checkpoint)
    with pytest.raises(WeightError) as error:
        fetch(server.url, "0:1", tmp_path / "node", layout=layout)
    assert error.value.file == f"{server.url}/{shard.name}"
    assert server.sent < 10_000


def test_an_index_cannot_lead_out_of_the_model(checkpoint, serve, layout, tmp_path):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../../secret"))
    with pytest.raises(WeightError, match="'../../secret.safetensors', which is not the name of a file beside it"):
        fetch(serve(checkpoint).url, "0:1", tmp_path / "node", layout=layout)


def test_a_redirect_is_followed_and_what_was_meant_for_one_server_not_told_to_another(split, serve, tmp_path):
    server, other = serve(split), serve(split)
    server.trick = lambda request: request.answer(307, Location=f"{other.url}/{request.name}") is None
    secrets = {
        "Authorization": "Bearer secret",
        "X-Api-Key": "secret",
        "cookie": "session=secret",
        "Accept-Encoding": "br",
    }
    fetch(f"{server.url}?download=1", "0:1", tmp_path / "node", headers=secrets)
    assert (tmp_path / "node/mid.00000.safetensors").read_bytes() == (split / "mid.00000.safetensors").read_bytes()
    for name in ("Authorization", "X-Api-Key", "Cookie"):
        assert all("secret" in request.headers[name] for request in server.requests)
    assert all(request.path.endswith("?download=1") for request in server.requests)
    assert other.requests
    assert not any("secret" in str(request.headers) for request in other.requests)
    assert all(request.headers["Accept-Encoding"] == "identity" for request in server.requests + other.requests)


def test_the_password_in_an_address_is_not_told_to_another_server(split, serve, tmp_path):
    server, other = serve(split), serve(split)
    server.trick = lambda request: request.answer(307, Location=f"{other.url}/{request.name}") is None
    fetch(server.url.replace("://", "://user:secret@"), "0:1", tmp_path / "node")
    assert all(request.headers["Authorization"].startswith("Basic ") for request in server.requests)
    assert other.requests
    assert not any("Authorization" in request.headers for request in other.requests)


def test_a_redirect_within_a_server_keeps_what_was_meant_for_it(split, serve, tmp_path):
    server = serve(split)

    def trick(request) -> bool:
        moved = f"{server.url}/moved/{request.name}"
        return "/moved/" not in request.path and request.answer(307, Location=moved) is None

    server.trick = trick
    fetch(server.url, "0:1", tmp_path / "node", headers={"X-Api-Key": "secret"})
    assert {request.headers["X-Api-Key"] for request in server.requests} == {"secret"}


def test_a_redirect_from_https_to_http_is_refused(monkeypatch, tmp_path):
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.scheme)
        if request.url.scheme == "https":
            return httpx2.Response(302, headers={"Location": "http://127.0.0.1/model"})
        return httpx2.Response(404)

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    monkeypatch.setattr(httpx2, "Client", lambda **settings: client)
    with pytest.raises(WeightError, match="the server leads from https to http"):
        fetch("https://127.0.0.1/model", "f", tmp_path / "node")
    assert set(asked) == {"https"}


def test_a_disk_without_room_is_said_before_anything_is_read(split, serve, tmp_path, monkeypatch):
    server = serve(split)
    shutil.rmtree(tmp_path / "node", ignore_errors=True)
    monkeypatch.setattr("os.statvfs", lambda path: type("Status", (), {"f_bavail": 1, "f_frsize": 512}))
    with pytest.raises(WeightError, match="the disk has only 512 free.*Make room"):
        fetch(server.url, "0:1", tmp_path / "node")
    assert not [request for request in server.requests if wants_weights(request)]
