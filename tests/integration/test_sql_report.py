"""What the consumer wrote, in SQL: infra/athena.sql and infra/report.py against pandas."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from helpers import ROOT, free_port, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

STATEMENTS = [each.strip() for each in (ROOT / "infra/athena.sql").read_text().split(";\n")]
SHARED = {
    title[1]: each
    for each in STATEMENTS
    if "(Athena only)" not in each and (title := re.search(r"^-- (\w+)[.:]", each, re.MULTILINE))
}
COLUMNS = ["Index", "Date", "Open", "High", "Low", "Close", "Adj Close", "Volume", "CloseUSD"]


@pytest.fixture
def written(run: Callable, env: dict[str, str], kafka, topic: str, objects: Callable):
    """A bucket with 400 rows of the CSV from two partitions, with a gap of two dead letters."""
    kafka.create_topic(f"{topic}-2", partitions=2)
    env |= {"KAFKA_TOPIC": f"{topic}-2", "KAFKA_GROUP_ID": f"group-{topic}-2", "S3_PREFIX": "raw/"}
    rows = pd.read_csv(env["CSV_PATH"], float_precision="round_trip").head(300)
    rows = rows.sample(400, replace=True, random_state=1).reset_index(drop=True)
    rows["Index"] = rows["Index"].where(rows.index % 3 > 0, "NYA")
    rows["partition"], rows["offset"] = rows.index % 2, rows.index // 2
    rows.loc[(rows["partition"] == 0) & (rows["offset"] >= 50), "offset"] += 2
    values = [json.dumps(row).encode() for row in rows[COLUMNS].to_dict("records")]
    produce(kafka.bootstrap, f"{topic}-2", values[0:100:2], partition=0)
    produce(kafka.bootstrap, f"{topic}-2", [b"not JSON", b"[]"], partition=0)
    produce(kafka.bootstrap, f"{topic}-2", values[100::2], partition=0)
    produce(kafka.bootstrap, f"{topic}-2", values[1::2], partition=1)
    assert run("kafka_consumer.py", "--max-messages", "402", env=env).wait(60) == 0
    found = objects()
    assert len(found) == 400 and "raw/partition=1/stock_market_199.json" in found
    return rows, found


@pytest.fixture
def sql(written, tmp_path: Path) -> Iterator[Callable[[str], pd.DataFrame]]:
    """Run a statement of athena.sql, by its number, on the objects; the table is all text there."""
    seal = {"raw/_seals/partition=0/0-9.json": b'{"partition": 0, "first": 0}'}
    for name, value in {**written[1], **seal}.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    table, by_partition = (each for each in STATEMENTS if "CREATE EXTERNAL TABLE" in each)
    fields = re.compile(r"^  .+`.+|^  'mapping.+", re.MULTILINE)
    assert fields.findall(table) == fields.findall(by_partition)
    keys = dict(re.findall(r"'mapping\.(\w+)' = '(.+)'", table))
    assert re.findall(r"^  `(\w+)` string", table, re.MULTILINE) == list(keys)
    db = duckdb.connect()
    db.execute("CREATE SCHEMA market")
    mapped = ", ".join(f'"{key}" AS "{column}"' for column, key in keys.items())
    db.read_json(
        str(tmp_path / "bucket/**/*.json"),
        columns=dict.fromkeys(keys.values(), "VARCHAR"),
        filename=True,
    ).create("files")
    db.execute(f'CREATE VIEW market.objects AS SELECT {mapped}, filename AS "$path" FROM files')
    for statement in STATEMENTS:
        if "CREATE OR REPLACE VIEW" in statement:
            db.execute(statement)
    yield lambda number: db.sql(SHARED[number]).df()
    db.close()


def test_the_queries_that_both_dialects_share_find_what_pandas_finds(written, sql) -> None:
    rows = written[0]
    found = {number: len(sql(number)) for number in SHARED if number != "view"}
    assert len(found) >= 10
    assert [number for number, count in found.items() if not count] == ["10"], "no row is wrong"

    counts = sql("1").set_index("index_name")
    assert counts["records"].to_dict() == rows["Index"].value_counts().to_dict()
    assert counts["days"].to_dict() == rows.groupby("Index")["Date"].nunique().to_dict()

    closes, days = sql("2"), rows.drop_duplicates(COLUMNS).sort_values(["Index", "Date"])
    assert closes["index_name"].tolist() == days["Index"].tolist()
    assert closes["trade_date"].astype(str).tolist() == days["Date"].tolist()
    assert closes["close"].tolist() == days["Close"].tolist()  # to the last bit
    assert closes["close_usd"].tolist() == days["CloseUSD"].tolist()

    averages = days.groupby("Index")["Close"].rolling(20, min_periods=1).mean()
    assert sql("3")["average_20"].tolist() == pytest.approx(averages.tolist())

    days["Date"] = pd.to_datetime(days["Date"])
    before = days.groupby("Index")[["Date", "Close"]].shift()
    near = (days["Date"] - before["Date"]).dt.days <= 7
    moves = (100 * (days["Close"] - before["Close"]) / before["Close"])[near]
    biggest = moves.reindex(moves.abs().sort_values(ascending=False).index)[:20]
    assert sql("4")["percent"].tolist() == pytest.approx(biggest.tolist())

    copies = rows.groupby(COLUMNS).size()
    assert sorted(sql("5")["copies"]) == sorted(copies[copies > 1])
    assert sql("6").to_dict("records") == [
        {"kafka_partition": 0, "first_missing": 50, "last_missing": 51, "missing": 2}
    ]


def test_the_report_has_every_record_and_its_page_needs_no_network(
    written, run, env, tmp_path
) -> None:
    rows, found = written
    script = run("infra/report.py", str(tmp_path / "out"), env=env)
    assert script.wait(60) == 0, script.stderr
    assert f"{len(found)} objects, {len(found)} rows" in script.stdout
    parquet = duckdb.read_parquet(str(tmp_path / "out/records.parquet")).df()
    same = parquet.rename(columns={"kafka_partition": "partition", "kafka_offset": "offset"})
    same["Date"] = same["Date"].astype(str)
    expected = rows.sort_values(["partition", "offset"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(same[expected.columns], expected, check_dtype=False)
    page = (tmp_path / "out/report.html").read_text()
    facts = facts_of(page)
    assert [each["missing"] for each in facts["partitions"]] == [2, 0]
    assert facts["partitions"][0]["gaps"] == [[50, 51]]
    assert {line["name"] for line in facts["values"]["series"]} == set(rows["Index"])
    assert sum(number for _, number in facts["throughput"]["bins"]) == len(found)
    assert facts["bytes"] == sum(map(len, found.values()))
    assert not re.search(r"https?://(?!www\.w3\.org/)", page), "something of the network"
    assert not re.search(r"<(script|img)[^>]+src=", page)


def test_the_report_asks_the_broker_for_lag_and_dead_letters_by_reason(
    written, run, env, kafka, topic, tmp_path
) -> None:
    produce(kafka.bootstrap, f"{topic}-2", [b"{}"] * 3, partition=1)  # not consumed
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    facts = facts_of((tmp_path / "report.html").read_text())
    assert facts["broker"]["lag"] == 3
    assert dict(facts["broker"]["letters"]) == {
        "JSON, but not an object: list": 1,
        "not JSON: Expecting value": 1,
    }
    assert [each["letters"] for each in facts["partitions"]] == [2, 0]


def test_a_broker_that_cannot_be_asked_is_named_in_the_report(run, env, s3, bucket, tmp_path):
    s3.client().put_object(Bucket=bucket, Key="stock_market_0.json", Body=b"{}")
    env |= {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    broker = facts_of((tmp_path / "report.html").read_text())["broker"]
    assert env["KAFKA_BOOTSTRAP_SERVERS"] in broker["unasked"]
    assert broker["lag"] is None and broker["letters"] is None


WIDTHS = [360, 700, 1600]
THEMES = ["light", "dark"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_a_browser_draws_every_chart_and_nothing_overflows(
    run, env, s3, bucket, tmp_path, width, theme
) -> None:
    for index in "AB":
        for n in range(9):
            row = {
                "Index": index,
                "Date": f"2008-04-{n + 1:02d}",
                "Close": 1.5 + n,
                "Volume": n * 7,
            }
            row["Comment"] = "a long text without a space in it".replace(" ", "_") * 3
            folder = "partition=1/" if index == "B" else ""
            name = f"{folder}stock_market_{n if n < 5 else n + 1}.json"
            s3.client().put_object(Bucket=bucket, Key=name, Body=json.dumps(row).encode())
    env |= {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    seen = look_at(tmp_path / "report.html", width, theme)
    assert seen["width"] == width, "the browser's window is not as wide as it should be"
    assert seen["background"] == {"light": "rgb(244, 245, 247)", "dark": "rgb(16, 20, 27)"}[theme]
    assert seen["overflowing"] == [] and seen["contentWidth"] <= width
    assert seen["curves"] == ["A", "B"] and seen["curvesOfOne"] == ["B"]
    assert seen["headings"] == ["Close by Index", "Volume by Index"], "a choice of columns"
    assert seen["bars"] > 0 and seen["gaps"] == 2
    assert seen["rows"] == 18


def test_a_topic_without_numbers_times_or_fields_has_a_page_too(run, env, s3, bucket, tmp_path):
    s3.client().put_object(Bucket=bucket, Key="stock_market_7.json", Body=b"{}")
    env |= {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    seen = look_at(tmp_path / "report.html", 800, "light")
    assert seen["curves"] == [] and seen["bars"] == 1 and seen["rows"] == 1


# Runs in the page, after it is drawn; what it finds is read from the document.
LOOK = """
const all = selector => [...document.querySelectorAll(selector)];
const names = () => all("path.curve").map(curve => curve.dataset.name);
const heading = () => document.querySelector("#values h2").textContent;
const seen = {
  width: innerWidth,
  contentWidth: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  overflowing: all("main *").filter(element => !element.closest(".scroll, .hint"))
    .filter(element => element.getBoundingClientRect().right > innerWidth)
    .map(element => element.outerHTML.slice(0, 200)),
  curves: names(),
  bars: all("rect.bar").length,
  gaps: all("rect.gap").length,
  rows: all("#latest tbody tr").length,
  headings: [heading()],
};
const chip = all(".chips button").find(button => button.textContent === "B");
if (chip) {
  chip.click();
  seen.curvesOfOne = names();
  const select = document.querySelector("#values select");
  select.value = 1;
  select.dispatchEvent(new Event("change"));
  seen.headings.push(heading());
}
for (const svg of all("svg")) {
  const box = svg.getBoundingClientRect(), at = {clientX: box.right - 20, clientY: box.top + 20};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
}
parent.postMessage(JSON.stringify(seen), "*");
"""
# No browser's window is as narrow as a telephone, but a frame in it can be.
FRAME = """<!DOCTYPE html><pre id="seen"></pre><script>
onmessage = message => { document.getElementById("seen").textContent = message.data; };
</script><iframe src="looked.html" style="border: 0" width="%d" height="900"></iframe>"""


def look_at(page: Path, width: int, theme: str) -> dict:
    """What a browser shows of a page, by LOOK; an error of the page fails the test."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a browser (apt install chromium)")
    looked, frame = page.with_name("looked.html"), page.with_name("frame.html")
    looked.write_text(page.read_text().replace("</body>", f"<script>{LOOK}</script></body>"))
    frame.write_text(FRAME % width)
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        f"--blink-settings=preferredColorScheme={THEMES.index(theme) ^ 1}",
        "--window-size=1800,1000",
        f"--user-data-dir={page.with_name('profile')}",
    ]
    command = [browser, *flags, "--dump-dom", str(frame)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stdout[-2000:]
    return json.loads(unescape(found[1]))


def facts_of(page: str) -> dict:
    """What a report's page is drawn from."""
    found = re.search(r'id="facts">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def store(faulty: FaultyS3, bucket: str, count: int) -> None:
    """Objects of a consumer in the memory of a server that is none."""
    for n in range(count):
        faulty.store[f"{bucket}/stock_market_{n}.json"] = b'{"a": %d}' % n
    faulty._sorted = sorted(faulty.store)


@pytest.fixture
def offline(env, bucket) -> Iterator[tuple[FaultyS3, dict[str, str]]]:
    """300 objects in a server that can be broken, and the settings; the broker is not there."""
    with FaultyS3(latency=0.01) as faulty:
        store(faulty, bucket, 300)
        here = {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
        yield faulty, {**env, **here, "S3_ENDPOINT_URL": faulty.endpoint}


def test_the_report_reads_many_objects_at_once(offline, run, tmp_path) -> None:
    faulty, env = offline
    faulty.fail("hang", only=("get",))
    run("infra/report.py", str(tmp_path), env=env)
    until(lambda: sum(r.operation == "get" for r in list(faulty.requests)) == 64, what="64 reads")


def test_reads_that_fail_now_and_then_are_made_again(offline, run, tmp_path) -> None:
    faulty, env = offline
    faulty.fail("503", probability=0.05, only=("get",))
    script = run("infra/report.py", str(tmp_path), env=env)
    assert script.wait(60) == 0, script.stderr
    assert "300 objects, 300 rows" in script.stdout
    assert any(request.status == 503 for request in faulty.requests)


def test_a_read_that_is_denied_is_one_line(offline, run, tmp_path) -> None:
    faulty, env = offline
    faulty.fail("403", only=("stock_market_200.json",))
    script = run("infra/report.py", str(tmp_path), env=env)
    assert script.wait(60) == 1
    assert "AccessDenied" in script.stderr and len(script.lines("stderr")) == 1


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_read(
    offline, run, tmp_path
) -> None:
    faulty, env = offline
    (tmp_path / "file").write_text("mine")
    script = run("infra/report.py", str(tmp_path / "file"), env=env)
    assert script.wait() == 1
    assert script.stderr.startswith(f"{tmp_path / 'file'}: ")
    assert len(script.lines("stderr")) == 1 and not faulty.requests


def test_a_report_that_cannot_be_written_leaves_the_one_before(offline, run, tmp_path) -> None:
    _faulty, env = offline
    (tmp_path / "report.html").mkdir()  # it cannot be replaced
    (tmp_path / "report.html" / "mine").touch()
    script = run("infra/report.py", str(tmp_path), env=env)
    assert script.wait() == 1
    assert script.stderr.startswith(f"{tmp_path}: ") and len(script.lines("stderr")) == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"records.parquet", "report.html"}


def test_ctrl_c_ends_the_report_with_one_line(offline, run, tmp_path) -> None:
    faulty, env = offline
    faulty.fail("hang", only=("get",))
    script = run("infra/report.py", str(tmp_path), env=env)
    until(lambda: any(r.operation == "get" for r in list(faulty.requests)), what="a read")
    script.process.send_signal(signal.SIGINT)
    assert script.wait(10) == 1
    assert "stopped" in script.stderr and len(script.lines("stderr")) == 1


def test_a_terminal_shows_a_bar_while_objects_are_read(offline, tmp_path) -> None:
    faulty, env = offline
    faulty.latency = 0.2
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "infra/report.py"), str(tmp_path)]
    script = subprocess.Popen(command, env=env, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end of the terminal is closed
        pass
    os.close(ours)
    assert script.wait() == 0
    bars = re.findall(rb"\[(#+)\.*\] (\d+) of 300 objects", shown)
    assert bars and [int(done) for _, done in bars] == sorted(int(done) for _, done in bars)
    assert all(len(bar) == 20 * int(done) // 300 for bar, done in bars)


@pytest.mark.parametrize(
    ("setting", "value", "code", "said"),
    [
        ("S3_BUCKET", "", 2, "S3_BUCKET is not set"),
        ("S3_BUCKET", "no-such-bucket", 1, "does not exist"),
        ("S3_PREFIX", "empty/", 1, "no object"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", 1, "signature"),
    ],
)
def test_a_wrong_setting_of_the_report_is_one_line(run, env, setting, value, code, said) -> None:
    script = run("infra/report.py", env={**env, setting: value})
    assert script.wait() == code
    assert said in script.stderr and len(script.lines("stderr")) == 1


def test_the_report_without_its_extra_says_what_to_install(run, env, tmp_path) -> None:
    (tmp_path / "duckdb.py").write_text("raise ImportError(name=__name__)")
    script = run("infra/report.py", env={**env, "PYTHONPATH": str(tmp_path)})
    assert script.wait() == 1
    (line,) = script.lines("stderr")
    assert line.startswith("duckdb is not installed: ") and line.endswith("pip install '.[report]'")


def test_the_report_takes_values_that_are_json_but_odd(run, env, s3, bucket, tmp_path) -> None:
    odd = [
        b'{\n "Index": "A",\r\n "Date": "2020-01-01", "Close": 1.5\n}',
        b'{"Index": "</script>", "Date": "none", "Close": null, "x": {"y": [1, {"z": "2"}]}}',
        b"{}",
        b'{"kafka_offset": 5, "a": 1, "a": 2, "s": "\\ud800", "big": 1e300}',
        b'{"big": 1e999, "b": 1, "B": 2, "x": [], "": 0}',
        b'{"long": %s, "longer": %s}' % (b"9" * 400, b"9" * 5000),
    ]
    for n, value in enumerate(odd):
        s3.client().put_object(Bucket=bucket, Key=f"stock_market_{n}.json", Body=value)
    script = run("infra/report.py", str(tmp_path), env=env)
    script.wait(60)
    assert "6 objects, 6 rows" in script.stdout, script.stderr
    page = (tmp_path / "report.html").read_text()
    assert '"</script>"' not in page, "not escaped"
    texts = [text for row in facts_of(page)["latest"]["rows"] for text in row]
    assert "</script>" in texts and look_at(tmp_path / "report.html", 500, "light")["rows"] == 6


def test_a_date_without_end_is_not_drawn(run, env, s3, bucket, tmp_path) -> None:
    for n, day in enumerate(["2020-01-01", "infinity", "2020-01-03"]):
        value = json.dumps({"Date": day, "Close": n}).encode()
        s3.client().put_object(Bucket=bucket, Key=f"stock_market_{n}.json", Body=value)
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    (line,) = facts_of((tmp_path / "report.html").read_text())["values"]["series"]
    assert line["values"] == [[0], [2]] and None not in line["x"]
