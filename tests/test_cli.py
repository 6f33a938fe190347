"""The command line's contract: exit codes, messages, streams, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models as small

import graphfold
from graphfold.cli import main

TIMEOUT = 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(small.conv_bn_relu(), path)
    return path


@pytest.fixture
def run(capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        return code, found.out, found.err

    return call


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "graphfold", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False, **options)


def assert_one_message(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("graphfold: error: ")
    assert "Traceback" not in stderr
    return lines[0]


# Help -----------------------------------------------------------------------------------------


def test_help_answers_at_once():
    process("--help")
    assert min(_processor_seconds("--help") for _ in range(3)) < 0.3


def _processor_seconds(*arguments: str) -> float:
    """What a command takes where nothing else is running: wall time would count the others."""
    before = os.times()
    assert process(*arguments).returncode == 0
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def test_nothing_heavy_is_imported_for_help():
    code = "import sys, graphfold.cli; print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    loaded = set(found.stdout.split())
    assert not loaded & {"onnx", "onnxruntime", "onnx_ir", "numpy", "torch", "scipy"}


@pytest.mark.parametrize(
    "command",
    [
        "optimize",
        "inspect",
        "verify",
        "bench",
        "plan",
        "score",
        "finetune",
        "search",
        "expand",
    ],
)
def test_every_command_has_help_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"graphfold {command}" in out
    assert "--json" in out


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"graphfold {graphfold.__version__}")


def test_the_schema_of_plans_is_printed(run):
    code, out, _ = run("plan", "--schema")
    assert code == 0
    assert json.loads(out)["type"] == "object"


def test_a_plan_is_for_a_model(run):
    code, out, err = run("plan")
    assert (code, out) == (2, "")
    assert "which model" in assert_one_message(err)


# Usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimise", "m.onnx"], "optimize"),
        (["optimize", "m.onnx", "--dry-rum"], "--dry-run"),
        (["optimize"], "MODEL"),
        ([], "--help"),
        (["optimize", "m.onnx", "--tolerance", "small"], "--tolerance"),
        (["optimize", "m.onnx", "--tolerance", "-1"], "--tolerance"),
        (["bench", "m.onnx", "--threads", "0"], "--threads"),
        (["verify", "-", "-"], "stdin"),
    ],
)
def test_usage_errors_name_what_is_meant(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in assert_one_message(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "-o", "-"], "--json"),
        (["--no-verify", "--require-verify"], "--require-verify"),
        (["--in-place", "-o", "x.onnx"], "--in-place"),
        (["--external-data", "sometimes"], "always"),
        (["--external-data", "always", "-o", "-"], "external data"),
        (["--input-shape", "x:1,two"], "1,3,224,224"),
        (["--input-shape", "1,3,8,8", "--input-shape", "1,3,8,8"], "twice"),
        (["--input-shape", "z:1,3,8,8"], "'z'"),
        (["--input-shape", "1,3,9,8"], "does not fit"),
        (["--data", "nothing.npz"], "nothing.npz"),
        (["--data", "no_such_module:f"], "no_such_module"),
    ],
)
def test_options_that_contradict_or_do_not_fit(run, model, options, message):
    code, _, err = run("optimize", model, *options)
    assert code == 2
    assert message in assert_one_message(err)
    assert sorted(item.name for item in model.parent.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("option", ["--passes", "--skip-pass"])
def test_an_unknown_pass_names_the_nearest(run, model, option):
    code, _, err = run("optimize", model, option, "fold_batchnrom")
    assert code == 2
    assert "fold_batchnorm" in assert_one_message(err)


# Bad models -----------------------------------------------------------------------------------


def write(path: Path, content: bytes | None) -> Path:
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("command", ["optimize", "inspect", "verify", "bench"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated"])
def test_files_that_are_no_models(run, tmp_path, model, command, kind):
    whole = model.read_bytes()
    model.unlink()
    path = tmp_path / f"{kind}.onnx"
    contents = {"empty": b"", "text": b"hello\n" * 100, "truncated": whole[: len(whole) // 2]}
    if kind == "folder":
        path.mkdir()
    else:
        write(path, contents.get(kind))
    arguments = [command, path, path] if command == "verify" else [command, path]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert path.name in assert_one_message(err)
    assert {item.name for item in tmp_path.iterdir()} <= {path.name}


def test_a_model_that_the_checker_refuses(run, tmp_path):
    bad = small.conv_bn_relu()
    bad.graph.node[0].input[0] = "nowhere"
    path = write(tmp_path / "bad.onnx", bad.SerializeToString())
    code, _, err = run("optimize", path)
    assert code == 2
    assert "nowhere" in assert_one_message(err)


def test_a_model_that_cannot_be_run_is_written_with_a_warning(run, tmp_path):
    path = write(tmp_path / "custom.onnx", small.custom_operator().SerializeToString())
    code, out, err = run("optimize", path, "--json")
    assert code == 0
    assert "not verified" in err
    document = json.loads(out)
    assert document["verification"] is None
    assert "Unheard" in document["reason"]
    assert (tmp_path / "custom.folded.onnx").exists()


def test_requiring_verification_refuses_it(run, tmp_path):
    path = write(tmp_path / "custom.onnx", small.custom_operator().SerializeToString())
    code, _, err = run("optimize", path, "--require-verify")
    assert code == 1
    assert_one_message(err)
    assert not (tmp_path / "custom.folded.onnx").exists()


# Outputs --------------------------------------------------------------------------------------


def test_the_default_output_stands_beside_the_model(run, model):
    before = model.read_bytes()
    code, out, err = run("optimize", model)
    assert code == 0
    assert "BatchNormalization" in out
    assert "model.folded.onnx" in err
    folded = onnx.load(model.with_name("model.folded.onnx"))
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    assert model.read_bytes() == before


def test_quiet_says_nothing(run, model):
    assert run("optimize", model, "-q") == (0, "", "")


def test_the_input_is_never_the_output(run, model):
    before = model.read_bytes()
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    for path in (model, link):
        code, _, err = run("optimize", model, "-o", path)
        assert code == 2
        assert "--in-place" in assert_one_message(err)
    assert model.read_bytes() == before


def test_in_place_replaces_it(run, model):
    code, _, _ = run("optimize", model, "--in-place", "-q")
    assert code == 0
    folded = onnx.load(model)
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    assert [item.name for item in model.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("option", ["-o", "--reference-out", "--report"])
@pytest.mark.parametrize("kind", ["folder", "no folder", "file as folder"])
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    run, model, monkeypatch, option, kind
):
    monkeypatch.setattr(graphfold, "optimize", lambda *a, **k: pytest.fail("work has begun"))
    folder = model.parent
    (folder / "sub").mkdir()
    paths = {
        "folder": folder / "sub",
        "no folder": folder / "absent" / "out.onnx",
        "file as folder": model / "out.onnx",
    }
    code, _, err = run("optimize", model, option, paths[kind])
    assert code == 2
    assert_one_message(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run, model):
    locked = model.parent / "locked"
    locked.mkdir(mode=0o500)
    code, _, err = run("optimize", model, "-o", locked / "out.onnx")
    assert code == 2
    assert "ermission" in assert_one_message(err)


def test_a_refusal_of_the_file_system_is_one_message(run, model, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    code, _, err = run("optimize", model)
    assert code == 2
    assert "Permission denied" in assert_one_message(err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["-o", "--report", "--reference-out"])
def test_a_full_disk_is_one_message_and_leaves_nothing(run, model, option):
    code, _, err = run("optimize", model, option, "/dev/full", "-q")
    assert code == 2
    assert "/dev/full" in assert_one_message(err)
    assert Path("/dev/full").is_char_device()
    if option == "-o":
        assert [item.name for item in model.parent.iterdir()] == ["model.onnx"]


def test_two_outputs_in_one_file_are_refused(run, model):
    out = model.with_name("out.onnx")
    code, _, err = run("optimize", model, "-o", out, "--reference-out", out)
    assert code == 2
    assert "same file" in assert_one_message(err)


def test_a_device_is_written_to_and_stays_one(run, model):
    code, _, _ = run("optimize", model, "-o", os.devnull, "-q")
    assert code == 0
    assert Path(os.devnull).is_char_device()


def test_reference_and_report_are_written_too(run, model):
    reference, page = model.with_name("reference.onnx"), model.with_name("report.html")
    code, _, _ = run("optimize", model, "--reference-out", reference, "--report", page, "-q")
    assert code == 0
    onnx.checker.check_model(onnx.load(reference))
    assert page.read_text().startswith("<!doctype html>")
    assert model.with_name("model.folded.onnx").exists()


def test_what_was_written_goes_when_a_later_output_fails(run, model, monkeypatch):
    import graphfold.model

    def fail(*arguments, **options):
        raise graphfold.errors.OutputError("disk full", where="out.onnx")

    monkeypatch.setattr(graphfold.model, "save", fail)
    code, _, err = run("optimize", model, "--report", model.with_name("report.html"))
    assert code == 2
    assert "disk full" in assert_one_message(err)
    assert [item.name for item in model.parent.iterdir()] == ["model.onnx"]


def test_a_dry_run_writes_nothing(run, model):
    code, out, _ = run(
        "optimize", model, "--dry-run", "--json", "--report", model.with_name("r.html")
    )
    assert code == 0
    assert json.loads(out)["output"] is None
    assert [item.name for item in model.parent.iterdir()] == ["model.onnx"]


# JSON -----------------------------------------------------------------------------------------


def test_json_of_optimize_follows_the_contract(run, model):
    code, out, err = run("optimize", model, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["model"] == str(model)
    assert document["output"] == str(model.with_name("model.folded.onnx"))
    assert document["nodes"]["before"] > document["nodes"]["after"]
    assert document["ops"]["BatchNormalization"] == [1, 0]
    assert document["verification"]["max_rel"] < 1e-5
    assert {"load", "write"} <= set(document["seconds"])
    assert "verified on" in err


def test_json_of_the_other_commands(run, model):
    _, out, _ = run("inspect", model, "--json")
    assert json.loads(out)["nodes"] == 6
    _, out, _ = run("verify", model, model, "--json")
    assert json.loads(out)["passed"] is True
    _, out, _ = run("bench", model, "--json", "--seconds", "0.1", "--rounds", "3")
    assert json.loads(out)["models"][0]["median_ms"] > 0


def test_nothing_else_gets_onto_stdout(run, model, tmp_path, monkeypatch):
    (tmp_path / "chatty.py").write_text(
        "import os, numpy as np\n"
        "def feeds():\n"
        "    print('from python')\n"
        "    os.write(1, b'from below python')\n"
        "    os.system('echo from a child')\n"
        "    yield {'x': np.ones((2, 3, 8, 8), np.float32)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run("optimize", model, "--json", "--data", "chatty:feeds")
    assert code == 0
    assert json.loads(out)["verification"]["inputs"] == "1 given"
    for text in ("from python", "from below python", "from a child"):
        assert text in err


def test_errors_are_json_too(run):
    code, out, err = run("optimize", "absent.onnx", "--json")
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2
    assert_one_message(err)


def test_no_colours_outside_a_terminal(run, model):
    _, out, _ = run("inspect", model)
    assert "\x1b[" not in out


# Pipelines ------------------------------------------------------------------------------------


def test_a_model_goes_through_a_pipeline(model):
    first = process("optimize", "-", "-o", "-", input=model.read_bytes())
    assert first.returncode == 0
    assert b"BatchNormalization" in first.stderr
    folded = onnx.load_from_string(first.stdout)
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    second = process("inspect", "-", "--json", input=first.stdout)
    assert json.loads(second.stdout)["ops"]["Conv"] == 1


def test_the_pipeline_gives_the_bytes_of_the_file(run, model):
    run("optimize", model, "-q")
    piped = process("optimize", "-", "-o", "-", "-q", input=model.read_bytes())
    assert piped.stdout == model.with_name("model.folded.onnx").read_bytes()


def test_stdin_needs_an_output(model):
    found = process("optimize", "-", input=model.read_bytes())
    assert found.returncode == 2
    assert "-o" in assert_one_message(found.stderr.decode())


@pytest.mark.parametrize("content", [b"", b"hello\n" * 100])
def test_stdin_that_is_no_model(content):
    found = process("optimize", "-", "-o", "-", input=content)
    assert (found.returncode, found.stdout) == (2, b"")
    assert_one_message(found.stderr.decode())


def test_a_reader_that_leaves_early_is_no_error(model):
    command = f"{sys.executable} -m graphfold inspect {model} | head -1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert "Traceback" not in found.stderr
    assert found.stdout.splitlines()[-1] == "0"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [["--json"], [], ["-o", "-"]])
def test_a_stdout_that_cannot_be_written(model, options):
    with Path("/dev/full").open("wb") as full:
        found = subprocess.run(
            [sys.executable, "-m", "graphfold", "optimize", str(model), *options],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT,
            check=False,
        )
    assert found.returncode == 2
    assert b"Traceback" not in found.stderr
    assert b"error: stdout" in found.stderr


# Verification ---------------------------------------------------------------------------------


def other_weights(path: Path) -> Path:
    changed = small.conv_bn_relu()
    for tensor in changed.graph.initializer:
        if tensor.name == "g":
            tensor.CopyFrom(onnx.numpy_helper.from_array(small.weight(5, 4) * 1.01, "g"))
    onnx.save(changed, path)
    return path


def test_models_that_differ_exit_with_one(run, model, tmp_path):
    other = other_weights(tmp_path / "other.onnx")
    code, out, err = run("verify", model, other, "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False
    assert "'y'" in assert_one_message(err)
    code, out, _ = run("verify", model, other)
    assert code == 1
    assert "FAILED" in out
    assert run("verify", model, other, "--tolerance", "0.1", "-q") == (0, "", "")


def test_a_failed_verification_writes_nothing(run, model, monkeypatch):
    from graphfold.errors import VerificationError

    def fail(*arguments, **options):
        raise VerificationError("output 'y' differs; to avoid it: --skip-pass fold_batchnorm")

    monkeypatch.setattr(graphfold, "optimize", fail)
    code, out, err = run("optimize", model)
    assert (code, out) == (1, "")
    assert "--skip-pass" in assert_one_message(err)
    assert [item.name for item in model.parent.iterdir()] == ["model.onnx"]


def test_verification_can_be_skipped(run, model):
    code, out, err = run("optimize", model, "--no-verify", "--json")
    assert code == 0
    assert json.loads(out)["verification"] is None
    assert "warning" not in err


def test_given_data_is_what_is_verified_on(run, model, tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, x=np.ones((20, 3, 8, 8), np.float32), labels=np.zeros(20))
    code, out, _ = run("optimize", model, "--data", data, "--json")
    assert code == 0
    assert json.loads(out)["verification"]["inputs"] == "3 given"


def test_models_that_cannot_be_run_cannot_be_compared(run, tmp_path):
    path = write(tmp_path / "custom.onnx", small.custom_operator().SerializeToString())
    code, _, err = run("verify", path, path)
    assert code == 2
    assert "Unheard" in assert_one_message(err)


# Internal errors and signals ------------------------------------------------------------------


def test_a_bug_says_how_to_report_it(run, model, monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("some tensor")

    monkeypatch.setattr(graphfold, "optimize", broken)
    code, out, err = run("optimize", model)
    assert (code, out) == (3, "")
    assert "internal error: KeyError" in err
    assert "report" in err
    assert "Traceback" not in err
    code, _, err = run("optimize", model, "--debug")
    assert code == 3
    assert "Traceback" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_work_with_130_and_nothing_written(model, tmp_path, number):
    marker = tmp_path / "started"
    (tmp_path / "slow.py").write_text(
        textwrap.dedent(
            f"""
            import pathlib, time
            def feeds():
                pathlib.Path({str(marker)!r}).touch()
                time.sleep({TIMEOUT})
                yield {{}}
            """
        )
    )
    out = tmp_path / "out.onnx"
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "graphfold", "optimize", str(model)),
            *("-o", str(out), "--data", "slow:feeds", "--json"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + TIMEOUT
    while not marker.exists():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(number)
    stdout, stderr = started.communicate(timeout=TIMEOUT)
    assert started.returncode == 130
    assert stdout == b""
    assert b"Traceback" not in stderr
    assert not out.exists()
    assert sorted(item.name for item in tmp_path.glob("*.onnx")) == ["model.onnx"]


def test_signal_handlers_are_left_as_they_were(run, model):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run("inspect", model)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_folder_as_model_is_bad_input_wherever_its_name_is_empty(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graphfold", "optimize", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "graphfold: error: .: is a directory, not a model\n"
