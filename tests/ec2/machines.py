"""Machines for tests of infra/: network namespaces with disks and processes of their own.

Each is held by a process that ends when the test does, however it does, and takes everything with
it: nothing is mounted, installed or configured on the machine that runs the tests.

The network is Amazon's in small, with addresses for documentation (RFC 5737) as the public ones:

    laptop 198.51.100.20 -- internet -- 198.51.100.1 router 10.0.0.1 -- vpc -- 10.0.0.x instances

The router gives each instance its public address by 1:1 NAT, holds the metadata service, and is the
security group: from outside only the laptop gets in, and only to port 9092; instances reach each
other.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LAPTOP = "198.51.100.20"
CLONE_NEWNET = 0x40000000


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
    """A machine with a disk and processes of its own, which can lose its power."""

    def __init__(self) -> None:
        # What is written to these folders stays on a disk in memory; reading sees the real ones.
        script = """
            mount -t tmpfs disk /mnt
            for folder in etc opt var usr/local root home; do
              mkdir -p /mnt/$folder/upper /mnt/$folder/work
              mount -t overlay overlay /$folder \
                -o lowerdir=/$folder,upperdir=/mnt/$folder/upper,workdir=/mnt/$folder/work
            done
            rm -rf /etc/systemd/system/* /etc/resolv.conf
            echo "nameserver 127.0.0.1" > /etc/resolv.conf  # no name is known, and said at once
            exec cat
        """
        self.holder = hold(
            "unshare", "--net", "--mount", "--propagation=private", "bash", "-euc", script
        )
        self.power_on()
        self.sh("ip link set lo up")

    def power_on(self) -> None:
        disk = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", *super().enter]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # an init that ignores SIGCHLD leaves no zombies
        init = "mount -t tmpfs run /run; exec env --ignore-signal=CHLD cat"
        self.power = hold(*disk, *own, "sh", "-c", init)
        children = Path(f"/proc/{self.power.pid}/task/{self.power.pid}/children")
        self.init = int(children.read_text())

    def power_off(self) -> None:
        """Everything that runs there is gone at once."""
        if self.power.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self.power.communicate()

    def reboot(self) -> None:
        """Lose power, come back, start what is enabled."""
        self.power_off()
        self.power_on()
        self.sh("systemctl default")

    @property
    def enter(self) -> list[str]:
        java = os.path.dirname(shutil.which("java") or "/usr/bin/java")
        path = f"{HERE}/bin:{java}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [
            *("nsenter", f"--target={self.init}", "--mount", "--net", "--pid"),
            *("env", "-i", f"PATH={path}", "HOME=/root", "LANG=C.UTF-8"),
        ]

    def close(self) -> None:
        self.power_off()
        super().close()


class Network:
    """The router with all it serves, the laptop, and the instances added to it."""

    def __init__(self, folder: Path) -> None:
        self.addresses = folder / "metadata"
        self.addresses.mkdir()
        self.mirror = folder / "mirror"
        self.mirror.mkdir()
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
        self.servers = [
            self.router.start(sys.executable, str(HERE / "metadata.py"), str(self.addresses)),
            self.router.start(
                *(sys.executable, "-m", "http.server", "8000"),
                *("--bind", "10.0.0.1", "--directory", str(self.mirror)),
            ),
        ]

    def instance(self, private: str, public: str) -> Instance:
        machine = Instance()
        self.machines.append(machine)
        port = f"vpc{len(self.machines)}"
        self.router.sh(
            f"""
            ip link add {port} type veth peer name eth0 netns {machine.holder.pid}
            ip link set {port} master vpc up
            """
        )
        machine.sh(
            f"""
            ip address add {private}/24 dev eth0
            ip link set eth0 up
            ip route add default via 10.0.0.1
            """
        )
        self.give(private, public)
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
        for server in self.servers:
            server.kill()
            server.wait()
        for machine in self.machines:
            machine.close()
