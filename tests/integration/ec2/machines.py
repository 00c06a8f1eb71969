"""Machines for tests of infra/, booted with a systemd, a disk and a network of their own.

Each is held by a process that ends when the test does, however it does, and takes everything with
it: nothing is mounted, installed or configured on the machine that runs the tests.

The network is Amazon's in small, with addresses for documentation (RFC 5737) as the public ones:

    laptop 198.51.100.20 -- internet -- 198.51.100.1 router 10.0.0.1 -- vpc -- 10.0.0.x instances

The router gives each instance its public address by 1:1 NAT, holds the metadata service, and is the
security group: from outside only the laptop gets in, and only to port 9092; instances reach each
other. It is archive.apache.org to the instances, and has a proxy for their package managers, which
is their only way out.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from local_stack import LOCAL

from . import proxy

HERE = Path(__file__).parent
LAPTOP = "198.51.100.20"
CLONE_NEWNET = 0x40000000

KEPT = LOCAL / "machine"
RELEASE = "bookworm"
# what the images of the cloud have and the smallest Debian has not
PACKAGES = [
    "systemd-sysv",
    "dbus",
    "sudo",
    "curl",
    "ca-certificates",
    "iproute2",
    "passwd",
    "procps",
]
USER = "ec2-user"
UP = {"running", "degraded"}
JAVA = "openjdk-17-jre-headless openssl"

# systemd-networkd would wait two minutes for a network that is configured from outside.
PREPARE = """
    systemctl -q mask systemd-networkd.service systemd-networkd.socket \
      systemd-networkd-wait-online.service
    useradd --create-home --shell /bin/bash --groups adm,sudo ec2-user
    echo "ec2-user ALL=(ALL) NOPASSWD:ALL" > /etc/sudoers.d/ec2-user
    echo "umask 077" >> /home/ec2-user/.profile  # as hardened images have it
    echo {name} > /etc/hostname
    printf '%s\n' "127.0.0.1 localhost {name}" "10.0.0.1 archive.apache.org" > /etc/hosts
    echo "nameserver 127.0.0.1" > /etc/resolv.conf  # no name is known, and said at once
    echo 'Acquire::http::Proxy "http://10.0.0.1:3128";' > /etc/apt/apt.conf.d/proxy
    printf '%s\n' "[global]" "proxy = http://10.0.0.1:3128" \
      "cert = /etc/ssl/certs/ca-certificates.crt" > /etc/pip.conf
"""

# Machines side by side would share one cgroup, and each systemd would find the others' processes.
OWN_CGROUP = """
    for tree in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
      if [ -e $tree/cgroup.procs ]; then
        mkdir -p $tree/{name}
        echo $$ > $tree/{name}/cgroup.procs
      fi
    done
"""

BOOT = (
    "systemd-nspawn --boot --quiet --register=no --keep-unit --kill-signal=SIGRTMIN+4"
    " --resolv-conf=off --link-journal=no --timezone=off --capability=CAP_NET_ADMIN"
)


def hold(*command: str) -> subprocess.Popen[bytes]:
    """Start a command that ends in `cat`, and wait until it has come that far."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    assert process.stdin and process.stdout and process.stderr
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"\n")
    if not process.stdout.read(1):
        raise OSError(process.stderr.read().decode().strip())
    return process


class Machine:
    """A machine on the network: its name space, with the file system of this one."""

    def __init__(self) -> None:
        self.holder = hold("unshare", "--net", "cat")
        self.sh("ip link set lo up")

    @property
    def enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]

    def sh(self, script: str, *, check: bool = True, timeout: float = 600) -> str:
        """Run a bash script there as root; its output, both streams together."""
        done = subprocess.run(
            [*self.enter, "bash", "-euo", "pipefail", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"exit {done.returncode}: {script}\n{done.stdout}"
        self.code = done.returncode
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A process there, for as long as this one lives."""
        return subprocess.Popen(
            [*self.enter, "setpriv", "--pdeathsig", "KILL", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """What this thread opens or starts inside the block is on that machine's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.holder.pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(there, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            yield
        finally:
            libc.setns(back, CLONE_NEWNET)
            os.close(back)
            os.close(there)

    def close(self) -> None:
        self.holder.kill()
        self.holder.communicate()


class Instance(Machine):
    """A machine with a disk of its own, booted by systemd-nspawn; it can lose its power.

    Its disk is a root tree that is shared and never written to, with an overlay in memory. `sh`
    runs as root in all of its name spaces. `log_in` is what a person does: the user of the image,
    who may sudo.
    """

    def __init__(self, private: str, trees: list[Path], trusted: Path) -> None:
        """`trees` are the layers of its disk, `trusted` is its file of certificate authorities."""
        self.hostname = f"ip-{private.replace('.', '-')}"
        self.cgroup = f"test-{self.hostname}-{secrets.token_hex(4)}"
        lower = ":".join(str(tree) for tree in trees)
        script = f"""
            mount -t tmpfs disk /mnt
            mkdir /mnt/upper /mnt/work /mnt/root
            mount -t overlay overlay /mnt/root \
              -o lowerdir={lower},upperdir=/mnt/upper,workdir=/mnt/work
            cp {trusted} /mnt/root/etc/ssl/certs/ca-certificates.crt
            chroot /mnt/root bash -euc {shlex.quote(PREPARE.format(name=self.hostname))} >&2
            exec cat
        """
        self.holder = hold(
            "unshare", "--net", "--mount", "--propagation=private", "bash", "-euc", script
        )
        self.power: subprocess.Popen[bytes] | None = None
        self.init = 0
        self.console = trusted.with_name(f"{self.cgroup}.log")
        self.sh_outside("ip link set lo up")

    def sh_outside(self, script: str) -> None:
        """In its network, before it has booted."""
        subprocess.run([*super().enter, "bash", "-euc", script], check=True)

    def power_on(self) -> None:
        """Boot, and wait until systemd has started what is enabled."""
        mount = f"--mount=/proc/{self.holder.pid}/ns/mnt"
        # The shell ends with its stdin, that is with this process, and takes the machine with it.
        script = f"""
            {OWN_CGROUP.format(name=self.cgroup)}
            {BOOT} --hostname={self.hostname} --directory=/mnt/root &
            nspawn=$!
            {{ cat; kill -9 $nspawn; }} <&3 &
            wait $nspawn
            kill $!
        """
        command = ["nsenter", mount, *super().enter, "bash", "-c", f"exec 3<&0\n{script}"]
        with self.console.open("ab") as console:
            self.power = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=console, stderr=console
            )
        self.init = self._find_init(self.power.pid)
        deadline = time.monotonic() + 300
        while self.sh("systemctl is-system-running --wait || true").strip() not in UP:
            assert time.monotonic() < deadline, self.console.read_text(errors="replace")
            time.sleep(0.1)

    def _find_init(self, shell: int) -> int:
        """The process that is the machine's number 1, a grandchild of the shell."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for nspawn in children(shell):
                for child in children(nspawn):
                    with contextlib.suppress(OSError):
                        command = Path(f"/proc/{child}/comm").read_text().strip()
                        if command == "systemd" and numbers(child)[-1:] == ["1"]:
                            return child
            time.sleep(0.05)
        raise AssertionError(f"no systemd: {self.console.read_text(errors='replace')}")

    def power_off(self) -> None:
        """Everything that runs there is gone at once."""
        if self.power and self.power.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self.init:
                    os.kill(self.init, signal.SIGKILL)
            self.power.communicate()

    def shut_down(self) -> None:
        """Stopped in order, as EC2 stops an instance."""
        assert self.power
        self.sh("systemctl poweroff")
        self.power.wait(240)

    @property
    def enter(self) -> list[str]:
        name_spaces = ("--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup", "--root")
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [
            *("nsenter", f"--target={self.init}", *name_spaces),
            *("env", "-i", path, "HOME=/root", "LANG=C.UTF-8"),
        ]

    @property
    def log_in_command(self) -> list[str]:
        return [*self.enter, "su", "-", USER, "-c"]

    def log_in(self, script: str, *, check: bool = True, timeout: float = 900) -> str:
        """Run a bash script as the user of the image; its output, both streams together."""
        done = subprocess.run(
            [*self.log_in_command, f"set -eo pipefail\n{script}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"exit {done.returncode}: {script}\n{done.stdout}"
        self.code = done.returncode
        return done.stdout

    def unit(self, name: str, setting: str) -> str:
        """What systemd says of a unit: one of its properties."""
        return self.sh(f"systemctl show --property {setting} --value {name}").strip()

    def close(self) -> None:
        self.power_off()
        super().close()
        for folder in Path("/sys/fs/cgroup").glob(f"**/{self.cgroup}"):
            remove_cgroup(folder)


def remove_cgroup(folder: Path) -> None:
    """Remove a control group with those below it, as soon as their last processes are gone."""
    deadline = time.monotonic() + 20
    for cgroup in [*sorted(folder.rglob("*/"), reverse=True), folder]:
        while cgroup.exists():
            try:
                cgroup.rmdir()
            except OSError:
                assert time.monotonic() < deadline, f"{cgroup} is busy"
                time.sleep(0.05)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        return [int(child) for child in text.split()]
    return []


def numbers(process: int) -> list[str]:
    """The numbers that a process has in the nested name spaces it is in, the innermost last."""
    status = Path(f"/proc/{process}/status").read_text()
    return re.findall(r"^NSpid:(.*)$", status, re.MULTILINE)[0].split()


# --- The disks ---


def root_tree() -> Path:
    """A bare Debian, made once by debootstrap and kept beside the other things that are fetched."""
    tree = KEPT / RELEASE
    if not tree.exists():
        new = KEPT / f"{RELEASE}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        options = ["--variant=minbase", f"--include={','.join(PACKAGES)}"]
        run(["debootstrap", *options, RELEASE, str(new)])
        new.rename(tree)
    return tree


def java_tree() -> Path:
    """What Java adds to the bare Debian, as the upper layer of an overlay: one machine of the tests
    installs it, for the others it is there."""
    tree = KEPT / f"{RELEASE}-java"
    if not tree.exists():
        new = KEPT / f"{RELEASE}-java.new"
        shutil.rmtree(new, ignore_errors=True)
        for folder in ("upper", "work", "root"):
            (new / folder).mkdir(parents=True)
        script = f"""
            cd {new}
            mount -t overlay overlay root -o lowerdir={root_tree()},upperdir=upper,workdir=work
            mount -t proc proc root/proc
            export DEBIAN_FRONTEND=noninteractive
            chroot root apt-get update -qq
            chroot root apt-get install -y -qq --no-install-recommends {JAVA}
            chroot root apt-get clean
        """
        run(["unshare", "--mount", "--propagation=private", "bash", "-euc", script])
        (new / "upper").rename(tree)
        shutil.rmtree(new)
    return tree


def run(command: list[str]) -> None:
    """Run a command; what it printed is in the error when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise OSError(f"exit {done.returncode}: {' '.join(command[:1])}: {done.stdout[-2000:]}")


class Network:
    """The router with all it serves, the laptop, and the instances added to it."""

    def __init__(self, folder: Path) -> None:
        self.addresses = folder / "metadata"
        self.addresses.mkdir()
        self.archive = folder / "archive"  # https://archive.apache.org/
        self.releases = self.archive / "dist" / "kafka" / "3.3.1"
        self.releases.mkdir(parents=True)
        self.folder = folder
        self.router, self.laptop = Machine(), Machine()
        self.machines: list[Machine] = [self.router, self.laptop]
        self.public: dict[str, str] = {}
        self.router.sh(
            f"""
            sysctl -qw net.ipv4.ip_forward=1
            ip link add vpc type bridge
            ip address add 10.0.0.1/24 dev vpc
            ip address add 169.254.169.254/32 dev vpc
            ip link set vpc up
            ip link add internet type veth peer name eth0 netns {self.laptop.holder.pid}
            ip address add 198.51.100.1/24 dev internet
            ip link set internet up
            """
        )
        self.laptop.sh(
            f"""
            ip address add {LAPTOP}/24 dev eth0
            ip link set eth0 up
            ip route add default via 198.51.100.1
            """
        )
        self.metadata = self.router.start(
            sys.executable, str(HERE / "metadata.py"), str(self.addresses)
        )
        with self.router.here():
            to_proxy = socket.create_server(("10.0.0.1", 3128))
            to_archive = socket.create_server(("10.0.0.1", 443))
        self.servers = [proxy.serve(to_proxy), self.serve_archive(to_archive)]

    def serve_archive(self, listener: socket.socket) -> ThreadingHTTPServer:
        """Apache's archive, with a certificate that the instances trust."""
        certificate = self.folder / "archive.pem"
        name = "archive.apache.org"
        run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
                *("-keyout", str(certificate), "-out", str(self.folder / "archive.crt")),
            ]
        )
        own = (self.folder / "archive.crt").read_text()
        certificate.write_text(certificate.read_text() + own)
        bundle = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        self.trusted = self.folder / "trusted.crt"
        self.trusted.write_text(Path(bundle).read_text() + own)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        handler = partial(Files, directory=str(self.archive))
        server = ThreadingHTTPServer(listener.getsockname(), handler, bind_and_activate=False)
        server.socket.close()
        server.socket = context.wrap_socket(listener, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def instance(self, private: str, public: str, *, java: bool = True) -> Instance:
        """A machine that has booted; without Java it is as Debian's installer leaves it."""
        trees = [java_tree(), root_tree()] if java else [root_tree()]
        machine = Instance(private, trees, self.trusted)
        self.machines.append(machine)
        port = f"vpc{len(self.machines)}"
        self.router.sh(
            f"""
            ip link add {port} type veth peer name eth0 netns {machine.holder.pid}
            ip link set {port} master vpc up
            """
        )
        machine.sh_outside(
            f"""
            ip address add {private}/24 dev eth0
            ip link set eth0 up
            ip route add default via 10.0.0.1
            """
        )
        self.give(private, public)
        machine.power_on()
        return machine

    def give(self, private: str, public: str) -> None:
        """The public address of an instance, from now on."""
        (self.addresses / private).write_text(public)
        self.public[private] = public
        to = ", ".join(f"{public} : {private}" for private, public in self.public.items())
        back = ", ".join(f"{private} : {public}" for private, public in self.public.items())
        rules = f"""
            flush ruleset
            table ip amazon {{
              chain in {{
                type nat hook prerouting priority dstnat;
                dnat to ip daddr map {{ {to} }}
              }}
              chain out {{
                type nat hook postrouting priority srcnat;
                oifname "internet" snat to ip saddr map {{ {back} }}
              }}
              chain security_group {{
                type filter hook forward priority filter; policy drop;
                ct state established,related accept
                ip saddr {LAPTOP} tcp dport 9092 accept
                ct status dnat drop
                ip saddr 10.0.0.0/24 accept
              }}
            }}
        """
        self.router.sh(f"nft -f - <<'END'\n{rules}\nEND")

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        self.metadata.kill()
        self.metadata.wait()
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
