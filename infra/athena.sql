-- The bucket in SQL, on Amazon Athena (engine version 3). Put your bucket and prefix (S3_BUCKET,
-- S3_PREFIX) into LOCATION, and run the statements one at a time. Query results must go to another
-- folder than LOCATION: Athena reads every object below it.
--
-- "(Athena only)" marks what is not standard; tests run all the rest with DuckDB on the objects that
-- the consumer wrote. Athena itself has not been run.

-- database (Athena only)
CREATE DATABASE IF NOT EXISTS market;

-- table: one JSON object a file (Athena only)
-- Not partitioned: root objects and the partition=<p>/ folders are both read, and new ones are seen
-- at once (a prefix has to end in / for this). Everything is text here, so that one odd value cannot
-- fail a query; the view has types.
-- Athena's column names are lower case and have no spaces: each key is named as it is in the JSON.
CREATE EXTERNAL TABLE IF NOT EXISTS market.objects (
  `index` string,
  `date` string,
  `open` string,
  `high` string,
  `low` string,
  `close` string,
  `adj_close` string,
  `volume` string,
  `closeusd` string
)
ROW FORMAT SERDE 'org.openx.data.jsonserde.JsonSerDe'
WITH SERDEPROPERTIES (
  'case.insensitive' = 'FALSE',
  'mapping.index' = 'Index',
  'mapping.date' = 'Date',
  'mapping.open' = 'Open',
  'mapping.high' = 'High',
  'mapping.low' = 'Low',
  'mapping.close' = 'Close',
  'mapping.adj_close' = 'Adj Close',
  'mapping.volume' = 'Volume',
  'mapping.closeusd' = 'CloseUSD'
)
LOCATION 's3://YOUR-BUCKET/YOUR-PREFIX/';

-- view: one row a record, with types
CREATE OR REPLACE VIEW market.records AS
SELECT
  CAST(coalesce(nullif(regexp_extract("$path", 'partition=([0-9]+)/stock_market_', 1), ''), '0') AS integer)
    AS kafka_partition,
  TRY_CAST(regexp_extract("$path", 'stock_market_([0-9]+)\.json$', 1) AS bigint) AS kafka_offset,
  "index" AS index_name,
  TRY_CAST("date" AS date) AS trade_date,
  TRY_CAST("open" AS double) AS open,
  TRY_CAST(high AS double) AS high,
  TRY_CAST(low AS double) AS low,
  TRY_CAST("close" AS double) AS close,
  TRY_CAST(adj_close AS double) AS adj_close,
  TRY_CAST(volume AS double) AS volume,
  TRY_CAST(closeusd AS double) AS close_usd
FROM market.objects
WHERE "$path" LIKE '%stock_market_%.json';  -- not the audit's seals

-- view: one row for each index and day (the producer picks rows with replacement)
CREATE OR REPLACE VIEW market.days AS
SELECT DISTINCT index_name, trade_date, open, high, low, close, adj_close, volume, close_usd
FROM market.records;

-- 1. count by index
SELECT index_name, count(*) AS records, count(DISTINCT trade_date) AS days,
  min(trade_date) AS first_day, max(trade_date) AS last_day
FROM market.records
GROUP BY index_name
ORDER BY records DESC, index_name;

-- 2. daily closes
SELECT index_name, trade_date, close, close_usd
FROM market.days
ORDER BY index_name, trade_date;

-- 3. moving averages of 20 and 200 days
SELECT index_name, trade_date, close,
  avg(close) OVER (PARTITION BY index_name ORDER BY trade_date ROWS BETWEEN 19 PRECEDING AND CURRENT ROW) AS average_20,
  avg(close) OVER (PARTITION BY index_name ORDER BY trade_date ROWS BETWEEN 199 PRECEDING AND CURRENT ROW) AS average_200
FROM market.days
ORDER BY index_name, trade_date;

-- 4. biggest moves between days at most a week apart
WITH moves AS (
  SELECT index_name, trade_date, close,
    lag(trade_date) OVER (PARTITION BY index_name ORDER BY trade_date) AS day_before,
    lag(close) OVER (PARTITION BY index_name ORDER BY trade_date) AS close_before
  FROM market.days
)
SELECT index_name, day_before, trade_date, close_before, close,
  100 * (close - close_before) / close_before AS percent
FROM moves
WHERE date_diff('day', day_before, trade_date) <= 7 AND close_before > 0
ORDER BY abs((close - close_before) / close_before) DESC, index_name, trade_date
LIMIT 20;

-- 5. duplicates by content
SELECT index_name, trade_date, close, count(*) AS copies,
  min(kafka_offset) AS first_offset, max(kafka_offset) AS last_offset
FROM market.records
GROUP BY index_name, trade_date, open, high, low, close, adj_close, volume, close_usd
HAVING count(*) > 1
ORDER BY copies DESC, index_name, trade_date;

-- 6. gaps in the offsets: dead letters, or what retention removed
WITH steps AS (
  SELECT kafka_partition, kafka_offset,
    lead(kafka_offset) OVER (PARTITION BY kafka_partition ORDER BY kafka_offset) AS next_offset
  FROM market.records
)
SELECT kafka_partition, kafka_offset + 1 AS first_missing, next_offset - 1 AS last_missing,
  next_offset - kafka_offset - 1 AS missing
FROM steps
WHERE next_offset > kafka_offset + 1
ORDER BY kafka_partition, first_missing;

-- 7. range and volume by month
SELECT index_name, date_trunc('month', trade_date) AS month,
  max(high) AS high, min(low) AS low, sum(volume) AS volume
FROM market.days
GROUP BY index_name, date_trunc('month', trade_date)
ORDER BY index_name, month;

-- 8. gain by year, from the first to the last close
SELECT index_name, year(trade_date) AS year,
  100 * (max_by(close, trade_date) / min_by(close, trade_date) - 1) AS percent
FROM market.days
WHERE close > 0
GROUP BY index_name, year(trade_date)
ORDER BY index_name, year;

-- 9. swing within the day: mean and worst, in percent of the low
SELECT index_name, avg(100 * (high - low) / low) AS mean_swing, max(100 * (high - low) / low) AS worst_swing,
  max_by(trade_date, (high - low) / low) AS worst_day
FROM market.days
WHERE low > 0
GROUP BY index_name
ORDER BY mean_swing DESC;

-- 10. rows that cannot be right: no day, no close, a high below the low, a close outside them
SELECT kafka_partition, kafka_offset, index_name, trade_date, high, low, close
FROM market.records
WHERE trade_date IS NULL OR close IS NULL OR high < low OR close > high OR close < low
ORDER BY kafka_partition, kafka_offset;

-- 11. all of it as Parquet, for when small files are slow: then FROM market.parquet (Athena only)
CREATE TABLE market.parquet
WITH (format = 'PARQUET', external_location = 's3://YOUR-BUCKET-FOR-RESULTS/parquet/') AS
SELECT * FROM market.records;

-- 12. the same for a topic of several partitions, of which a query shall read only some (Athena only)
-- Projection makes the partitions out of the range below: nothing has to be crawled, repaired or
-- added, and WHERE kafka_partition = 3 lists and reads that folder alone. Set the range to what the
-- topic has. Partition 0 has no folder of its own, so this table does not hold it: take it from
-- market.records with WHERE kafka_partition = 0, which reads all of them.
-- What projection does not change is the price of one object a record: each is listed (1,000 in a
-- request) and fetched (a request each), so a million records are a million GETs in every query of
-- all of them. Projection saves what lies in other folders; statement 11 saves the rest.
CREATE EXTERNAL TABLE IF NOT EXISTS market.objects_by_partition (
  `index` string,
  `date` string,
  `open` string,
  `high` string,
  `low` string,
  `close` string,
  `adj_close` string,
  `volume` string,
  `closeusd` string
)
PARTITIONED BY (kafka_partition int)
ROW FORMAT SERDE 'org.openx.data.jsonserde.JsonSerDe'
WITH SERDEPROPERTIES (
  'case.insensitive' = 'FALSE',
  'mapping.index' = 'Index',
  'mapping.date' = 'Date',
  'mapping.open' = 'Open',
  'mapping.high' = 'High',
  'mapping.low' = 'Low',
  'mapping.close' = 'Close',
  'mapping.adj_close' = 'Adj Close',
  'mapping.volume' = 'Volume',
  'mapping.closeusd' = 'CloseUSD'
)
LOCATION 's3://YOUR-BUCKET/YOUR-PREFIX/'
TBLPROPERTIES (
  'projection.enabled' = 'true',
  'projection.kafka_partition.type' = 'integer',
  'projection.kafka_partition.range' = '1,11',
  'storage.location.template' = 's3://YOUR-BUCKET/YOUR-PREFIX/partition=${kafka_partition}/'
);
