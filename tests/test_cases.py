"""CSV files as people have them: what each kind gives, or the one line that ends the producer."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from config import SettingsError
from kafka_producer import CHUNK, read_rows


@pytest.fixture
def values(tmp_path):
    """Reads a file given as text or bytes; its rows as the producer sends them."""

    def read(content, name="some.csv", key_column=""):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = read_rows(file, key_column)
        if key_column:
            return [(key, value.decode()) for key, value in rows]
        return [value.decode() for _, value in rows]

    return read


@pytest.fixture
def warnings(caplog):
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("cell", "json"),
    [
        ("101.50", "101.50"),
        ("9007199254740993", "9007199254740993"),
        ("0.1234567890123456789012345678901", "0.1234567890123456789012345678901"),
        ("1" * 5000, "1" * 5000),
        ("+5", "5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("+.5e3", "0.5e3"),
        ("5.", "5"),
        ("-5.E+3", "-5E+3"),
        ("1e5", "1e5"),
        ("1E+5", "1E+5"),
        ("1e400", "1e400"),
        ("-0", "-0"),
        ("0.00", "0.00"),
        (" 10.5 ", "10.5"),
        ("\t7", "7"),
        ("\xa07\xa0", "7"),
        ("", "null"),
        ("  ", "null"),
        ("-", "null"),
        ("--", "null"),
        (" N/A ", "null"),
        ("NaN", "null"),
    ],
)
def test_a_cell_of_a_column_of_numbers(values, cell, json):
    assert values(f"a,b\n1,x\n{cell},y\n")[1] == f'{{"a": {json}, "b": "y"}}'


@pytest.mark.parametrize(
    "cell",
    [
        "000001",
        "-01",
        "1_000",
        "1 000",
        "1,5",
        "0x1F",
        "1e",
        ".",
        "+",
        "e5",
        "1.2.3",
        "--5",
        "Infinity",
        "-inf",
        "TRUE",
        "٣",
        "\uff11",
        "12-31",
        "1e5.0",
    ],
)
def test_a_cell_that_is_no_number_makes_its_column_text_as_written(values, cell):
    assert values(f'a,b\n1.50,x\n"{cell}",y\n NA ,z\n,w\n') == [
        '{"a": "1.50", "b": "x"}',
        f'{{"a": "{cell}", "b": "y"}}',
        '{"a": " NA ", "b": "z"}',
        '{"a": null, "b": "w"}',
    ]


def test_a_column_of_what_is_missing_alone_is_null(values):
    assert values("a,b\n-,x\nNA,y\n") == ['{"a": null, "b": "x"}', '{"a": null, "b": "y"}']


def test_the_key_is_the_cell_as_written(values):
    content = "code,n\n000001, 1 \nNA,2.50\n,-\n"
    assert [key for key, _ in values(content, key_column="code")] == [b"000001", b"NA"]
    assert [key for key, _ in values(content + "x,-\n", key_column="n")] == [b" 1 ", b"2.50", None]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"]
)
def test_line_ends_and_byte_order_marks_do_no_harm(values, newline, encoding):
    text = newline.join(["", "Größe,n", "日,1", "  ", '"two', 'lines",2', ""])
    codec = encoding.removesuffix("-bom")
    content = ("\ufeff" * encoding.endswith("-bom") + text).encode(codec)
    escaped = newline.replace("\r", "\\r").replace("\n", "\\n")
    assert values(content) == [
        '{"Größe": "日", "n": 1}',
        f'{{"Größe": "two{escaped}lines", "n": 2}}',
    ]


def test_names_and_text_may_hold_anything(values):
    assert values('"100%","say ""a"" %s",{}\nx%d,"\\\\","{0}"\n') == [
        '{"100%": "x%d", "say \\"a\\" %s": "\\\\\\\\", "{}": "{0}"}'
    ]


def test_a_cell_may_be_long(values):
    text = "x" * 1_000_000
    assert values(f"a,b\n1,{text}\n") == [f'{{"a": 1, "b": "{text}"}}']


def archive(kind, content):
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as file:
            file.writestr("some.csv", content)
    else:
        with tarfile.open(fileobj=made, mode=f"w:{kind.partition('.')[2]}") as file:
            about = tarfile.TarInfo("some.csv")
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_are_read_and_cut_ones_refused(values, kind):
    content = b"a,b\n" + b"".join(b"%d,%d.50\n" % (n, n * n) for n in range(2000))
    single = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packed = single[kind](content) if kind in single else archive(kind, content)
    assert len(values(packed, f"some.csv.{kind}")) == 2000
    with pytest.raises(SettingsError, match=r"cannot be read: .* damaged or cut short"):
        values(packed[: len(packed) // 2], f"some.csv.{kind}")


HTML = "<!DOCTYPE html>\n<html><body>Sign in, please</body></html>\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
GOOD = "a,b\n" + "1,2\n" * CHUNK


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Date;Open\n2024-01-02;10,5\n", "semicolons"),
        ("Date;Open\r\n2024-01-02;10.5\r\n", "semicolons"),
        ("Date\tOpen\n2024\t1\n", "tabs"),
        ("\ufeffDate\tOpen\n2024\t1\n".encode("utf-16-le"), "tabs"),
        ("Date|Open\n2024|1\n", r"'\|'"),
        (HTML, "web page"),
        ("\n  <HTML>\n", "web page"),
        (LFS, "Git LFS"),
        ('[{"a": 1},\n{"a": 2}]\n', "--stdin"),
        (gzip.compress(b"a\n1\n"), "not UTF-8: line 1 has the byte 0x8b"),
        (archive("zip", b"a\n1\n"), "NUL byte in line 1"),
        ("a,b\n1,x\0y\n", "NUL byte in line 2"),
        ('a,b\n"1\n2",x\n3,"y\n\0"\n', "NUL byte in line 5"),
        (
            "a,b\n1,x\n\n2,é\n".encode("latin-1"),
            "not UTF-8: line 4 has the byte 0xe9; save it as UTF-8",
        ),
        ('a,b\r"1\r\r2",x\r3,"é"\r'.encode("latin-1"), "not UTF-8: line 5"),
        ("a,b,c\n1,4,7,\n2,5,8,\n", "line 2 has 4, the header 3"),
        (GOOD + "3,4,5\n", f"line {CHUNK + 2} has 3, the header 2"),
        (GOOD + "1,2\n" * 7 + "3,4,\n", f"line {CHUNK + 9} has 3, the header 2"),
        ('a,b\n"x\ny",1\n1,2,3\n', "line 4 has 3"),
        (f'{GOOD}1,"two\n' + "3,4\n" * 9, f"quote in line {CHUNK + 2} that nothing closes"),
        ("", "is empty"),
        ("\n\r\n  \n", "is empty"),
        ("a,b\n", "no rows"),
    ],
)
def test_a_file_that_is_something_else_is_said_with_its_line(values, content, said):
    with pytest.raises(SettingsError, match=said) as caught:
        values(content)
    (line,) = caught.value.args
    assert line.startswith("CSV_PATH='") and "some.csv'" in line and line.isprintable()


@pytest.mark.parametrize(
    ("content", "said"), [(HTML, "web page"), (LFS, "Git LFS"), ("no", "damaged")]
)
@pytest.mark.parametrize("kind", ["gz", "zip", "xz"])
def test_what_is_named_like_an_archive_is_told_by_what_it_is(values, content, said, kind):
    with pytest.raises(SettingsError, match=said):
        values(content, f"some.csv.{kind}")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(SettingsError, match="is no file"):
        read_rows(tmp_path)


def test_a_column_of_numbers_but_a_few_is_said_once_with_the_line_of_the_first(values, warnings):
    assert values('Date,"a\nb",n\n"x\ny",1,"1,234.5"\nz,2,2\nw,x,-\nw,3,3.5%\n,,9\n,,8\n,,7\n')[
        0
    ] == ('{"Date": "x\\ny", "a\\nb": "1", "n": "1,234.5"}')
    (said,) = warnings()
    assert said.isprintable()
    assert "2 columns of text have numbers in most cells" in said
    assert r"1 cells of 'a\nb' are none, the first 'x' in line 6" in said
    assert "2 cells of 'n' are none, the first '1,234.5' in line 3" in said


def test_a_column_of_words_with_a_few_numbers_is_not_worth_a_word(values, warnings):
    values("a,b\n000001,NA\n000002,AAA\n600519,NULL\n")
    assert warnings() == []


def test_the_first_that_is_no_number_is_found_beyond_the_first_part_of_the_file(values, warnings):
    values(GOOD + "5,$6\n")
    (said,) = warnings()
    assert f"1 cells of 'b' are none, the first '$6' in line {CHUNK + 2}" in said


def test_short_rows_are_counted_and_the_first_is_named(values, warnings):
    assert values("a,b,c\n1,2,3\n\n4,5\nSource\n")[1:] == [
        '{"a": "4", "b": 5, "c": null}',
        '{"a": "Source", "b": null, "c": null}',
    ]
    assert "2 rows have fewer fields than the header, the first in line 4" in warnings()[0]


def test_names_that_are_missing_or_taken_are_said(values, warnings):
    assert values("Date,Close,Close,\n2024,1,2,3\n") == [
        '{"Date": 2024, "Close": 1, "Close.1": 2, "Unnamed: 3": 3}'
    ]
    assert (
        "line 1: 2 columns have no name, or one that is taken: 'Close' is 'Close.1'"
        in warnings()[0]
    )
