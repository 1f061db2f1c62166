"""What torchrun's console and every rank show when a rank fails, in each way that it can; and that all end."""

import re
import signal

from tests.helpers import launch

PROGRAM = ["-m", "tests.helpers.rank_processes"]
LOST = r"rank 0 \(on .*\): lost another rank, and ends \(Connection (closed|reset) by peer.*\)"


def run(logs, *flags, restarts=0, options=(), **environment):
    command = [*launch.options(logs, 2, *(options or ["--standalone"]), f"--max-restarts={restarts}"), *PROGRAM, *flags]
    return launch.end(launch.begin(command, **environment), logs)


def lines(text):
    """The lines of stderr but for the progress bar and the empty ones."""
    return [line for line in text.splitlines() if line and "it/s]" not in line and "?it/s" not in line]


def test_the_first_rank_speaks_for_all_and_a_signal_ends_all(tmp_path):
    process = launch.begin([*launch.options(tmp_path), *PROGRAM])
    launch.wait_until(process, tmp_path, "2 ranks")
    process.send_signal(signal.SIGTERM)
    done = launch.end(process, tmp_path)
    assert done.seconds < 30
    assert done.out == ["2 ranks\nended by SIGTERM after some steps\n", ""]
    assert "steps:" in done.err[0] and lines(done.err[0]) == []  # the progress bar
    [line] = lines(done.err[1])
    assert re.fullmatch(r"\[rank 1\] W.* a warning", line)


def test_a_rank_that_raises_is_the_one_that_is_blamed(tmp_path):
    done = run(tmp_path, "--fails=raise", "--rank=1")
    assert done.code == 1 and done.seconds < 30
    assert re.search(r"^rank 1 \(on .*\): Traceback", done.err[1], re.MULTILINE)
    assert done.err[1].rstrip().endswith("ValueError: a defect of ours")
    assert re.fullmatch(LOST, lines(done.err[0])[-1]) and "Traceback" not in done.err[0]
    root = done.console.partition("Root Cause")[2]
    assert "rank      : 1 " in root and "exitcode  : 1 " in root and "ValueError: a defect of ours" in root


def test_a_killed_rank_is_missed_at_once_and_all_come_back(tmp_path):
    # Without --standalone: torchrun's store is then the same one for every start.
    options = ["--master-addr=127.0.0.1", f"--master-port={launch.free_port()}"]
    done = run(tmp_path, "--fails=kill", "--steps=20", restarts=1, options=options)
    assert done.code == 0 and done.seconds < 30, done
    assert "failed (exitcode: -9) local_rank: 1" in done.console
    assert done.out[0] == "2 ranks\n2 ranks\nended by itself after 20 steps\n"
    assert re.search(LOST, done.err[0]) and "Traceback" not in done.err[0] + done.err[1]


def test_a_rank_that_nothing_reaches_says_where_it_hangs_and_ends(tmp_path):
    # Two thirds of the time in which torchrun would kill it.
    done = run(tmp_path, "--fails=hang", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="6")
    assert done.code == 1 and done.seconds < 30
    assert "rank 0: no step has ended in the 4 s since SIGTERM, so it ends here:" in done.err[0]
    assert "pthread_mutex_lock" in done.err[0]
    root = done.console.partition("Root Cause")[2]
    assert "rank      : 1 " in root and "exitcode  : 7 " in root


def test_what_one_rank_lacks_all_refuse_and_one_says(tmp_path):
    done = run(tmp_path, "--fails=together", restarts=2)
    assert done.code == 1 and done.seconds < 30
    said = lines(done.err[0] + done.err[1])
    assert len([line for line in said if "error:" in line]) == 1
    assert re.search(r"error: data.path is 'there': no such file \(on rank 1 of 2, which is on .*\)", "\n".join(said))
    # Another start would only say it again.
    assert not list(tmp_path.rglob("attempt_1")) and done.out == ["2 ranks\n", ""]
