"""The set-up of infra/ without a machine; test_ec2_machines.py has the rest."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_stack import ROOT, StackError, kafka_home

pytestmark = pytest.mark.detail

SETUP = ROOT / "infra" / "setup_kafka.sh"


def functions(script: str) -> str:
    """What bash prints for a script that has the functions of setup_kafka.sh."""
    return subprocess.check_output(["bash", "-c", f"source {SETUP}; {script}"], text=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.root
def test_help_and_wrong_options_need_no_root(open_folder: Path) -> None:
    folder = shutil.copytree(ROOT / "infra", open_folder, dirs_exist_ok=True)
    folder.chmod(0o755)

    def setup(*options: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "setup_kafka.sh"), *options]
        return subprocess.run(command, user=65534, capture_output=True, text=True)

    assert "--zookeeper-connect" in setup("--help").stdout
    for options, said in (
        (["--sekure"], "unknown option '--sekure'"),
        (["--broker-id", "one"], "--broker-id 'one'"),
        (["--broker-id"], "--broker-id needs a value"),
        (["--zookeeper-connect", "10.0.0.1"], "--zookeeper-connect '10.0.0.1'"),
        (["--public-address", "a b"], "--public-address 'a b'"),
        (["--purge"], "--purge goes with --uninstall"),
    ):
        done = setup(*options)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    done = setup()
    assert done.returncode == 1 and "as root" in done.stderr


def test_pasted_without_its_files_it_says_what_to_paste(tmp_path: Path) -> None:
    shutil.copy(SETUP, tmp_path)
    done = subprocess.run(["bash", tmp_path / SETUP.name], capture_output=True, text=True)
    assert done.returncode == 1 and "--user-data" in done.stderr


@pytest.mark.parametrize(
    ("manager", "packages"),
    [
        ("dnf", "java-17-amazon-corretto-headless shadow-utils tar"),
        ("apt-get", "openjdk-17-jre-headless passwd tar"),
    ],
)
def test_each_system_has_its_own_names_of_packages(manager: str, packages: str) -> None:
    script = f"for command in java useradd tar; do package {manager} $command; done"
    assert functions(script).split() == packages.split()


def test_user_data_is_as_small_as_ec2_wants_it_and_carries_all_files(tmp_path: Path) -> None:
    options = ["--user-data", "--secure", "--public-address", "kafka.example.com"]
    script = subprocess.check_output([SETUP, *options], text=True)
    assert len(script) <= 16384
    assert "setup_kafka.sh --secure --public-address kafka.example.com\n" in script
    unpack = script.partition("base64 -d")[2].rpartition("\n/usr/local")[0]
    unpack = f"base64 -d{unpack}".replace("/usr/local/lib/kafka-setup", str(tmp_path))
    subprocess.run(["bash", "-euc", unpack], check=True)
    again = subprocess.check_output([tmp_path / SETUP.name, *options], text=True)
    assert again == script  # nothing but comments and indentation was left out
    for name in (SETUP.name, "secure_kafka.sh"):
        subprocess.run(["bash", "-n", tmp_path / name], check=True)


def test_user_data_has_room_for_the_options_of_a_cluster_and_is_refused_where_it_has_none() -> None:
    members = ",".join(f"ip-10-0-0-{n}.eu-central-1.compute.internal:2181" for n in range(201, 204))
    options = ["--broker-id", "1", "--secure", "--public-address", "kafka-1.example.com"]
    options += ["--private-address", members[:40], "--zookeeper-connect", members]
    script = subprocess.check_output([SETUP, "--user-data", *options], text=True)
    assert len(script) <= 16384 and "--zookeeper-connect ip-10-0-0-201." in script
    url = f"https://mirror.example.com/{'far/' * 300}kafka.tgz"
    done = subprocess.run(
        [SETUP, "--user-data", *options, "--url", url], capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(
        r"setup_kafka.sh: user data of \d+ bytes, and EC2 takes 16384: .*\n", done.stderr
    )


@pytest.mark.parametrize("style", ["Apache's", "sha512sum's"])
def test_checksum_is_read_in_both_formats(tmp_path: Path, style: str) -> None:
    digest = hashlib.sha512(b"kafka").hexdigest()
    text = f"{digest}  kafka.tgz\n"
    if style == "Apache's":
        groups = re.findall(".{8}", digest.upper())
        text = f"kafka.tgz: {' '.join(groups[:8])}\n           {' '.join(groups[8:])}\n"
    (tmp_path / "sum").write_text(text)
    assert functions(f"checksum {tmp_path}/sum") == digest + "\n"


@pytest.mark.real
def test_kafka_knows_every_key_of_server_properties(tmp_path: Path) -> None:
    try:
        libs = kafka_home() / "libs"
    except StackError as error:
        pytest.skip(f"needs Apache Kafka's jars: {error}")
    text = (ROOT / "infra" / "server.properties").read_text().replace("#secure ", "")
    keys = re.findall(r"^([^#\s=]+)=", text, re.MULTILINE)
    # a listener, and a mechanism of SASL, have settings of their own under these prefixes
    keys = [re.sub(r"^listener\.name\.external\.(scram-sha-512\.)?", "", key) for key in keys]
    assert len(keys) > 20
    source = tmp_path / "Known.java"
    source.write_text(
        "public class Known { public static void main(String[] keys) {"
        " for (String key : keys) if (!kafka.server.KafkaConfig.configNames().contains(key))"
        " System.out.println(key); } }"
    )
    ask = ["java", "-cp", f"{libs}/*", str(source)]
    done = subprocess.run([*ask, *keys], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    done = subprocess.run([*ask, "log.dirz"], capture_output=True, text=True, check=True)
    assert done.stdout == "log.dirz\n"
