#!/usr/bin/env python3
"""A look at the bucket without AWS: a page with charts, and all records in one Parquet file.

Takes S3_BUCKET, S3_PREFIX, S3_ENDPOINT_URL and the AWS keys from where the consumer does; writes
report.html, which needs no network, and records.parquet into the folder named, or this one.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import IO, Any

from botocore.exceptions import BotoCoreError
from s3fs import S3FileSystem

try:
    import duckdb
    from plotly.subplots import make_subplots
except ImportError as error:
    sys.exit(f"{error.name} is not installed: pip install '.[report]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import Settings, SettingsError, environment
from kafka_consumer import NAME, bucket_is_set

RECORDS = """SELECT * EXCLUDE record, unnest(record) FROM read_json($lines, sample_size = -1,
    format = 'newline_delimited', map_inference_threshold = -1) ORDER BY ALL"""
CLOSES = 'SELECT DISTINCT "Index", "Date", "Close" FROM records ORDER BY ALL'
HOURS = "SELECT date_trunc('hour', written_at) AS x, count(*) AS y FROM records GROUP BY 1"
PLACES = "(SELECT 'partition ' || kafka_partition AS y, kafka_offset AS n FROM records)"
OFFSETS = f"SELECT y, min(n) AS base, max(n) + 1 - base AS x FROM {PLACES} GROUP BY y ORDER BY y"
GAPS = f"""SELECT y, n + 1 AS base, lead(n) OVER (PARTITION BY y ORDER BY n) - base AS x
    FROM {PLACES} QUALIFY x > 0"""


def fetch(settings: Settings, lines: IO[bytes]) -> int:
    """Write the consumer's objects, each as one line of JSON with its name and time; count them."""
    fs = S3FileSystem(endpoint_url=settings.s3_endpoint_url)
    root = f"{settings.s3_bucket}/{settings.s3_prefix}"
    listed = fs.find(settings.s3_bucket, prefix=settings.s3_prefix, detail=True)
    found = {path: match for path in listed if (match := NAME.fullmatch(path, len(root)))}
    for start in range(0, len(found), 1000):  # objects in memory at once
        print(f"{start} of {len(found)} objects read", file=sys.stderr)
        for path, value in fs.cat(list(found)[start : start + 1000]).items():
            p, n = found[path].groups()
            row = {"record": json.loads(value), "kafka_partition": int(p or 0)}
            row |= {"kafka_offset": int(n), "written_at": f"{listed[path]['LastModified']:%F %T}"}
            lines.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
    return len(found)


def charts(db: duckdb.DuckDBPyConnection, title: str) -> Any:
    """Close by index, objects an hour, and the offsets of each partition with their gaps in red."""
    hours, offsets, gaps = (db.sql(query).df() for query in (HOURS, OFFSETS, GAPS))
    missing = f"{gaps['x'].sum():.0f} missing: dead letters, or removed by retention"
    titles = ("Close", "Objects an hour (UTC)", f"Offsets ({missing})")
    page = make_subplots(rows=3, subplot_titles=titles, row_heights=[5, 3, 2], vertical_spacing=0.1)
    if {"Index", "Date", "Close"} <= set(db.table("records").columns):
        for n, (index, days) in enumerate(db.sql(CLOSES).df().groupby("Index")):
            look = {"name": str(index), "line": {"color": f"hsl({n * 137.5 % 360}, 65%, 45%)"}}
            page.add_scatter(x=days["Date"], y=days["Close"], **look, row=1, col=1)
    page.add_bar(**hours.to_dict("list"), width=36e5, offset=0, marker_color="navy", row=2, col=1)
    for bars, colour in ((offsets, "seagreen"), (gaps, "red")):
        mark = {"color": colour, "line": {"color": colour, "width": 1}}  # one of a million shows
        page.add_bar(**bars.to_dict("list"), marker=mark, orientation="h", row=3, col=1)
    page.update_yaxes(type="log", dtick="D2", minorloglabels="complete", row=1)
    page.update_traces(showlegend=False, selector={"type": "bar"})
    return page.update_layout(title=title, height=1100, template="plotly_white", barmode="overlay")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    folder = parser.parse_args(argv).folder
    try:
        settings = Settings.from_env(environment({}), bucket_is_set)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    where = f"s3://{settings.s3_bucket}/{settings.s3_prefix}"
    try:
        db, parquet = duckdb.connect(), folder / "records.parquet"
        with tempfile.NamedTemporaryFile(buffering=0) as lines:
            if not (objects := fetch(settings, lines)):
                raise FileNotFoundError("no object of the consumer is there")
            db.execute(f"CREATE TABLE records AS {RECORDS}", {"lines": lines.name})
        folder.mkdir(parents=True, exist_ok=True)
        db.table("records").write_parquet(str(parquet))
        rows = duckdb.read_parquet(str(parquet)).shape[0]
        charts(db, f"{where}: {objects} objects").write_html(folder / "report.html")
    except (BotoCoreError, OSError, ValueError, duckdb.Error) as error:
        print(f"{where}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    print(f"{objects} objects, {rows} rows in {parquet}, charts in {folder / 'report.html'}")
    return 0 if rows == objects else 1


if __name__ == "__main__":
    sys.exit(main())
