import sys
import textwrap

import pytest

from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.parity import exchange, process
from tests.helpers import tiny_parity


def python(path, code):
    """A stand-in for a reference's python, which runs this code whatever it is asked to run."""
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    path.chmod(0o755)
    return str(path)


def test_what_it_says_is_passed_on_and_its_folder_is_where_it_runs(tmp_path):
    said = []
    stand_in = python(tmp_path / "python", "import os, sys; print(*sys.argv[2:]); print(os.getcwd())")
    process.answer("bfl", stand_in, tmp_path, said.append)
    assert said == [f"bfl {tmp_path}", str(tmp_path)]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise ValueError('seventeen')", "its process ended with 1: ValueError: seventeen"),
        ("import sys; sys.exit(4)", "its process ended with 4: it said nothing"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL (out of memory?): it said nothing"),
        ("import sys; sys.stderr.write('cv2\\n'); sys.exit(3)", "has no module 'cv2'; pip install fluxbfl==0.0.3"),
    ],
)
def test_one_that_dies_leaves_its_last_line(code, line, tmp_path):
    with pytest.raises(UserError) as error:
        process.answer("bfl", python(tmp_path / "python", code), tmp_path, print)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_one_that_waits_is_ended_with_us(tmp_path):
    pids = []
    stand_in = python(tmp_path / "python", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")

    def interrupted(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.answer("bfl", stand_in, tmp_path, interrupted)
    with pytest.raises(ProcessLookupError):
        process.os.kill(pids[0], 0)


def test_checked_beforehand(tmp_path):
    process.check("bfl", sys.executable)
    process.check("diffusers", sys.executable)
    with pytest.raises(UserError, match="--reference_python is '/no/python': cannot be run"):
        process.check("bfl", "/no/python")
    with pytest.raises(UserError, match="it said nothing; should be a python"):
        process.check("bfl", "/bin/false")
    with pytest.raises(UserError, match="it said nothing; should be a python"):
        process.check("bfl", "/bin/true")


@pytest.mark.parametrize(
    ("reference", "remedy"),
    [
        ("bfl", "pip install fluxbfl==0.0.3"),
        ("diffusers", "pip install diffusers==0.42.1"),
        ("torchtitan", "in an environment of its own, pip install torch==2.13.0 torchtitan==0.3.0 triton"),
    ],
)
def test_a_reference_that_is_not_there_is_said_with_its_remedy(reference, remedy, tmp_path):
    bare = python(
        tmp_path / "python", f"import os, sys; os.execv({sys.executable!r}, ['python', '-IS', *sys.argv[1:]])"
    )
    with pytest.raises(UserError) as error:
        process.check(reference, bare)
    assert f"has no module '{process._MODULES[reference][0]}'; {remedy}" in str(error.value)


def test_references_need_nothing_of_ours(tmp_path):
    # A python that has all but flux_func; it answers as another environment's would.
    hidden = "import sys; sys.modules['flux_func'] = None; import runpy; sys.argv = sys.argv[1:]; "
    hidden += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    exchange.ask(tiny_parity.pose("bfl", flux.flavor("flux-tiny")), tmp_path)
    said = []
    process.answer("bfl", python(tmp_path / "python", hidden), tmp_path, said.append)
    assert said == ["forward and its stages", "gradients", "forward in bfloat16"]
    about = exchange.about(tmp_path)
    assert about["versions"]["fluxbfl"] == "0.0.3" and about["peak_bytes"] > 2**27 and about["seconds"] > 0
