"""What the consumer wrote, in SQL: infra/athena.sql and infra/report.py against pandas."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from helpers import ROOT, produce, until

pytestmark = pytest.mark.real

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
    for name, value in written[1].items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    table = next(each for each in STATEMENTS if "CREATE EXTERNAL TABLE" in each)
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
    assert "2 missing" in page and '"name":"NYA"' in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_a_browser_draws_every_chart_of_the_page(run, env, kafka, topic, tmp_path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a browser (apt install chromium)")
    row = '{"Index": "%s", "Date": "2008-04-%02d", "Close": %d}'
    values = [(row % (index, day, 1 + day)).encode() for index in "AB" for day in range(1, 10)]
    produce(kafka.bootstrap, topic, [*values[:5], b"not JSON", *values[5:]])
    assert run("kafka_consumer.py", "--max-messages", "19", env=env).wait() == 0
    assert run("infra/report.py", str(tmp_path), env=env).wait(60) == 0
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    page = [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{tmp_path / 'report.html'}"]
    drawn = subprocess.run([browser, *flags, *page], capture_output=True, text=True, timeout=120)
    dom = re.sub(r"<script.*?</script>", "", drawn.stdout, flags=re.DOTALL)
    assert dom.count('class="trace scatter') == 2, "a line for each index"
    assert dom.count('class="trace bars') == 3, "hours, offsets, gaps"
    assert "Offsets (1 missing" in dom


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
    assert script.lines("stderr") == ["duckdb is not installed: pip install '.[report]'"]


def test_the_report_takes_values_that_are_json_but_odd(run, env, kafka, topic, tmp_path) -> None:
    odd = [
        b'{\n "Index": "A",\r\n "Date": "2020-01-01", "Close": 1.5\n}',
        b'{"Index": "</script>", "Date": "none", "Close": null, "x": {"y": [1, {"z": "2"}]}}',
        b"{}",
        b'{"kafka_offset": 5, "a": 1, "a": 2, "s": "\\ud800", "big": 1e300}',
    ]
    produce(kafka.bootstrap, topic, odd)
    assert run("kafka_consumer.py", "--max-messages", "4", env=env).wait() == 0
    script = run("infra/report.py", str(tmp_path), env=env)
    until(lambda: script.process.poll() is not None, what="report")
    assert "4 objects, 4 rows" in script.stdout, script.stderr
    assert '"name":"</script>"' not in (tmp_path / "report.html").read_text(), "not escaped"
