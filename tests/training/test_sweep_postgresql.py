"""Two workers share a study in a real PostgreSQL server; one is killed, and the other finishes its trial too."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fisherviz.training import sweep
from fisherviz.training.study import with_driver

SMALL = {
    "limit": 60, "epochs": 1, "batch_size": 10, "model_options": {"hidden": [4]}, "tensorboard": False,
    "optimizer": "foof",
}  # fmt: skip
OVER = {"lr": [0.01, 0.03, 0.1, 0.3, 1.0], "damping": [0.1, 1.0]}
WORKER = """
import json, sys, time
from fisherviz.training import sweep
from fisherviz.training.run import Session
fields, over, url, out, slow = json.loads(sys.argv[1])
if slow:
    step = Session.step
    def slowly(session):
        found = step(session)
        print("stepped", flush=True)
        time.sleep(60)
        return found
    Session.step = slowly
print(len(sweep(fields, over, out=out, storage=url, study="shared", heartbeat=1).table))
"""


def program(name):
    """A program of the server, on the path or where Debian keeps it."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


def unprivileged():
    """The server refuses to run as root: it runs as another user then."""
    if os.geteuid() != 0:
        return {}, None
    import pwd

    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}, user
    pytest.skip("there is no unprivileged user to run PostgreSQL as")


@pytest.fixture
def server():
    """URL of an empty database on a server of its own."""
    driver = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), None)
    if driver is None:
        pytest.skip("neither psycopg nor psycopg2 is installed")
    driver = importlib.import_module(driver)
    initdb, postgres = program("initdb"), program("postgres")
    privileges, user = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="fisherviz-pg-"))  # short: paths of sockets are
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **privileges}
    running = None
    try:
        subprocess.run([initdb, "-D", "data", "-A", "trust", "-U", "tester", "--no-sync"], check=True, **quiet)
        running = subprocess.Popen(
            [postgres, "-D", "data", "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"], **quiet
        )
        for _ in range(300):
            try:
                driver.connect(host=str(folder), user="tester", dbname="postgres").close()
                break
            except driver.OperationalError:
                assert running.poll() is None, "the server has ended"
                time.sleep(0.1)
        yield f"postgresql://tester@/postgres?host={folder}"
    finally:
        if running is not None:
            running.send_signal(signal.SIGINT)
            running.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def worker(url, out, slow):
    given = json.dumps([SMALL, OVER, url, str(out), slow])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.slow
def test_two_workers_share_a_study_and_one_may_be_killed(tmp_path, server):
    optuna = pytest.importorskip("optuna")
    victim = worker(server, tmp_path / "victim", True)
    survivor = None
    try:
        assert victim.stdout.readline() == "stepped\n", victim.stderr.read()
        survivor = worker(server, tmp_path / "survivor", False)
        for _ in range(600):  # both at work on it
            if list((tmp_path / "survivor" / "runs").glob("*/seed-0/summary.json")):
                break
            time.sleep(0.1)
        victim.kill()
        out, err = survivor.communicate(timeout=240)
    finally:
        for process in (victim, survivor):
            if process is not None:
                process.kill()
                process.communicate()
    assert survivor.returncode == 0, err
    assert out == "10\n"
    found = sweep(SMALL, OVER, out=tmp_path / "survivor", storage=server, study="shared", heartbeat=1)
    alone = sweep(SMALL, OVER, out=tmp_path / "alone")
    names = [*alone.varied, "value", "low", "high"]
    assert found.table[names].equals(alone.table[names])
    states = [t.state.name for t in optuna.load_study(study_name="shared", storage=with_driver(server)).trials]
    assert sorted(states) == ["COMPLETE"] * 10 + ["FAIL"]  # the victim's, taken over
