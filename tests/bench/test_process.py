import contextlib
import json
import os
import select
import sys
import textwrap

import pytest

from flux_func.bench import process
from flux_func.bench.cases import Side
from flux_func.errors import UserError
from tests.helpers import tiny_bench


def python(path, code):
    """A stand-in for a peer's python, which runs this code whatever it is asked to run."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{textwrap.dedent(code)}")
    path.chmod(0o755)
    return str(path)


def test_it_answers_line_by_line_and_is_asked_with_what_it_needs(tmp_path):
    code = """
    print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("TORCHINDUCTOR_CACHE_DIR")]), flush=True)
    for line in sys.stdin:
        print(json.dumps(line), flush=True)
    """
    request, cache = tmp_path / "0.json", tmp_path / "compiled"
    with process.started("bfl", python(tmp_path / "python", code), request, cache) as (wait, step):
        assert wait() == [[process.serve.__file__, "bfl", str(request)], str(tmp_path), str(cache)]
        assert [step(), step()] == ["step\n", "step\n"]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise ValueError('seventeen')", "its process ended with 1: ValueError: seventeen"),
        ("sys.exit(4)", "its process ended with 4: it said nothing"),
        ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL (out of memory?): it said nothing"),
    ],
)
@pytest.mark.parametrize("when", ["before it is ready", "in a step"])
def test_one_that_dies_leaves_its_last_line(when, code, line, tmp_path):
    if when == "in a step":
        code = f"print('{{}}', flush=True); sys.stdin.readline(); {code}"
    with process.started("bfl", python(tmp_path / "python", code), tmp_path / "0.json") as (wait, step):
        if when == "in a step":
            assert wait() == {}
            wait = step
        with pytest.raises(UserError) as error:
            wait()
    assert str(error.value) == f"--peers has 'bfl': {line}"


def test_it_and_those_that_it_started_end_with_us(tmp_path):
    code = """
    child = os.fork()
    if child:
        print(json.dumps([os.getpid(), child]), flush=True)
    sys.stdin.read()
    """
    started = process.started("bfl", python(tmp_path / "python", code), tmp_path / "0.json")
    with contextlib.ExitStack() as watched:
        with pytest.raises(KeyboardInterrupt), started as (wait, _):
            ends = [os.pidfd_open(pid) for pid in wait()]
            watched.callback(lambda: [os.close(end) for end in ends])
            raise KeyboardInterrupt
        for end in ends:
            assert select.select([end], [], [], 60)[0]  # it can be read from once the process has ended


def test_a_reference_needs_nothing_of_ours(tmp_path):
    # A python that has all but flux_func; it answers as another environment's would.
    hidden = "sys.modules['flux_func'] = None; import runpy; sys.argv = sys.argv[1:]; "
    hidden += "runpy.run_path(sys.argv[0], run_name='__main__')"
    [path] = tiny_bench.ask(tiny_bench.case(), [Side("bfl")], tmp_path)
    with process.started("bfl", python(tmp_path / "python", hidden), path) as (wait, step):
        ready = wait()
        assert ready["about"]["versions"]["fluxbfl"] == "0.0.3"
        answer = step()
    expected = tiny_bench.work(path, "bfl").step().item()
    assert answer["loss"] == pytest.approx(expected, rel=1e-6)
    assert answer["peak_bytes"] > ready["imported_bytes"] + answer["kept_bytes"] > 2**27


def test_ours_finds_this_package_whatever_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    [path] = tiny_bench.ask(tiny_bench.case("forward"), [Side("ours")], tmp_path)
    with process.started("ours", sys.executable, path) as (wait, step):
        assert set(wait()) == {"about", "imported_bytes"}
        assert step()["loss"] == pytest.approx(tiny_bench.work(path).step().item(), rel=1e-6)
    assert json.loads(path.read_text())["work"] == "forward" and os.getcwd() == str(tmp_path)
