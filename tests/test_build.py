"""Tests of compiling at the first use: compile once, share the result, survive every failure.

Each case has a tiny source tree and a private cache, and separate processes where loading,
warnings or races matter. All other tests exercise the real kernels.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

from pyadv import _build, _cache, _native

ROOT = Path(_build.__file__).parent.parent
TORCH = _build.Torch("2.13.0+cpu", None, Path("torch"))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="native needs Linux")


class Sandbox:
    """A source tree, a cache and a compiler that records each time it compiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csrc = folder / "csrc"
        self.cache = folder / "cache"
        self.calls = folder / "calls"
        self.gate = folder / "gate"  # while this file exists the compiler waits
        for name in ("common", "cpu", "cuda"):
            (self.csrc / name).mkdir(parents=True)
        self.write("common/answer.h", "#define ANSWER 42\n")
        self.write("cpu/one.cpp", '#include "common/answer.h"\nint one() { return ANSWER; }\n')
        self.write(
            "ops_cpu.cpp",
            'int one();\nextern "C" __attribute__((visibility("default")))\n'
            "int pyadv_answer() { return one(); }\n",
        )
        self.write("ops_cuda.cpp", "int cuda_glue() { return 0; }\n")
        self.compiler = folder / "cxx"
        self.compiler.write_text(
            "#!/bin/bash\n"
            'if [[ "$*" != *--version* && "$*" == *" -c "* ]]; then\n'
            f"  echo call >> {self.calls}\n"
            f"  while [ -e {self.gate} ]; do sleep 0.05; done\n"
            'fi\nexec c++ "$@"\n'
        )
        self.compiler.chmod(self.compiler.stat().st_mode | stat.S_IXUSR)

    def write(self, name: str, text: str) -> None:
        (self.csrc / name).write_text(text)

    def start(self, code: str, **env: str) -> subprocess.Popen[str]:
        preamble = f"""
            import json, os, sys, threading, warnings
            from pathlib import Path
            import torch
            from pyadv import _build, _cache, _native
            _build.source_root = lambda: Path({str(self.csrc)!r})
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYADV_")}
        settings = {
            "PYADV_CACHE_DIR": str(self.cache),
            "PYADV_CUDA": "0",
            "CXX": str(self.compiler),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(code)],
            env={**inherited, **settings, **env},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str = "print(_native.load().cpu.source)", **env: str) -> tuple[str, str]:
        process = self.start(code, **env)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip(), err

    def obtain(self) -> str:
        """Return where the library comes from, asked in this process, without loading it."""
        plan = _build.plan_cpu(self.csrc, _build.this_torch())
        return _native._from_cache(plan, force=False).source

    @property
    def compiled(self) -> int:
        """The number of source files compiled so far (a whole build compiles two)."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    @property
    def entry(self) -> Path:
        (manifest,) = self.cache.glob("torch-*/cpu-*/manifest.json")
        return manifest.parent

    def fake(self, body: str = "") -> None:
        """Replace the compiler by a script that runs `body` and then writes empty outputs."""
        self.compiler.write_text(
            "#!/bin/bash\n"
            'if [[ "$*" == *--version* ]]; then echo fake 1.0; exit; fi\n'
            f"echo call >> {self.calls}\n{body}\n"
            'while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) deps=$2;; esac; shift; done\n'
            'if [ -n "$deps" ]; then echo "$out:" > "$deps"; fi\necho built > "$out"\n'
        )

    def wait_for(self, happened, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.02)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    box = Sandbox(tmp_path)
    monkeypatch.setenv("PYADV_CACHE_DIR", str(box.cache))
    monkeypatch.setenv("CXX", str(box.compiler))
    return box


@linux
@pytest.mark.build
class TestFirstUse:
    def test_compiles_once_then_comes_from_the_cache(self, box):
        out, err = box.run()
        assert out == "compiled"
        lines = err.splitlines()
        assert len(lines) == 2
        assert re.fullmatch(
            r"pyadv: compiling CPU kernels \(first use, about \d+ s\) into .*", lines[0]
        )
        assert str(box.entry) in lines[0]
        assert re.fullmatch(r"pyadv: compiled CPU kernels in [\d.]+ s", lines[1])
        assert box.run() == ("cache", "")
        assert box.compiled == 2

    def test_loads_what_was_compiled(self, box):
        code = "import ctypes; print(ctypes.CDLL(str(_native.load().cpu.path)).pyadv_answer())"
        assert box.run(code)[0] == "42"
        box.write("common/answer.h", "#define ANSWER 43\n")
        assert box.run(code)[0] == "43"

    def test_verbose_streams_the_build(self, box):
        assert "cpu/one.cpp" in box.run(PYADV_VERBOSE="1")[1]

    def test_threads_compile_once(self, box):
        code = """
            seen = []
            work = lambda: seen.append(_native.load())
            threads = [threading.Thread(target=work) for _ in range(8)]
            [t.start() for t in threads]; [t.join() for t in threads]
            print(len(seen), {s.cpu.source for s in seen})
        """
        assert box.run(code)[0] == "8 {'compiled'}"
        assert box.compiled == 2

    def test_import_compiles_nothing(self, box):
        out, _ = box.run(
            "import pyadv; print(_native.status().backend, _native.status().cpu.reason)"
        )
        assert out.startswith("reference not loaded yet")
        assert not box.cache.exists()
        assert box.compiled == 0

    def test_build_compiles_now(self, box):
        assert box.run("import pyadv; print(pyadv.build().cpu.source)")[0] == "compiled"
        assert box.run("import pyadv; print(pyadv.build().cpu.source)")[0] == "cache"
        assert box.run("import pyadv; print(pyadv.build(force=True).cpu.source)")[0] == "compiled"
        assert box.compiled == 4

    def test_forced_build_in_a_process_that_has_the_kernels_keeps_them(self, box):
        assert box.obtain() == "compiled"
        code = "print(_native.load().cpu.source, _native.build(force=True).cpu.source)"
        assert box.run(code)[0] == "cache cache"  # two copies would register every kernel twice
        assert box.compiled == 4

    def test_state_survives_a_fork(self, box):
        code = """
            before = _native.load()
            held = threading.Event()
            def hold():
                with _native._lock:
                    held.set(); threading.Event().wait()
            threading.Thread(target=hold, daemon=True).start()
            held.wait()
            if (child := os.fork()) == 0:
                with _native._lock:  # the parent's thread does not exist here
                    os._exit(7 if _native.load() is before else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); sys.stdout.flush()
            os._exit(0)
        """
        assert box.run(code)[0] == "7"


@linux
@pytest.mark.build
class TestSeveralProcesses:
    def test_two_at_once_compile_once(self, box):
        box.gate.touch()
        both = [box.start("print(_native.load().cpu.source)") for _ in range(2)]
        box.wait_for(lambda: box.compiled > 0)
        time.sleep(1.0)  # the second one reaches the lock
        box.gate.unlink()
        done = [process.communicate(timeout=120) for process in both]
        assert sorted(out.strip() for out, _ in done) == ["cache", "compiled"]
        assert box.compiled == 2

    def test_waiting_says_for_whom(self, box):
        box.gate.touch()
        builder = box.start("_native.load()")
        box.wait_for(lambda: box.compiled > 0)
        waiter = box.start("_cache.PATIENCE = 0.1; _native.load()")
        line = waiter.stderr.readline()
        assert re.match(rf"pyadv: waiting for process {builder.pid} on \S+, which compiles", line)
        box.gate.unlink()
        assert waiter.communicate(timeout=120)[1] == ""
        builder.communicate(timeout=120)

    def test_a_killed_builder_blocks_nobody(self, box):
        box.gate.touch()
        builder = box.start("_native.load()")
        box.wait_for(lambda: box.compiled > 0)
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
        assert list(box.cache.glob("torch-*/*.tmp*"))
        box.gate.unlink()
        assert box.run()[0] == "compiled"
        assert not list(box.cache.glob("torch-*/*.tmp*"))

    def test_an_interrupted_build_is_not_remembered_as_a_failure(self, box):
        box.gate.touch()
        builder = box.start("_native.load()")
        box.wait_for(lambda: box.compiled > 0)
        builder.send_signal(signal.SIGINT)
        box.gate.unlink()
        assert "KeyboardInterrupt" in builder.communicate(timeout=60)[1]
        assert not list(box.cache.glob("torch-*/*.failed"))
        assert box.run()[0] == "compiled"


@linux
@pytest.mark.build
class TestEntries:
    def test_keeps_its_log_and_says_what_it_built(self, box):
        box.obtain()
        assert (box.entry / "build.log").is_file()
        manifest = json.loads((box.entry / "manifest.json").read_text())
        assert manifest["info"]["flags"] == " ".join(_build.HOST_FLAGS)
        assert str(box.folder) not in json.dumps(manifest)
        assert str(box.folder).encode() not in (box.entry / "_ops.so").read_bytes()

    @pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest", "no manifest"])
    def test_a_broken_entry_is_built_again(self, box, how):
        box.obtain()
        library, manifest = box.entry / "_ops.so", box.entry / "manifest.json"
        content = library.read_bytes()
        if how == "truncated":
            library.write_bytes(content[: len(content) // 2])
        elif how == "flipped":
            library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif how == "missing":
            library.unlink()
        elif how == "manifest":
            manifest.write_text('{"files": []')
        else:
            manifest.unlink()
        assert box.obtain() == "compiled"
        assert box.obtain() == "cache"

    def test_without_a_compiler_another_compilers_library_serves(self, box, monkeypatch):
        box.obtain()
        monkeypatch.setenv("CXX", "/nonexistent")
        assert box.obtain() == "cache"

    def test_the_key_follows_content_alone(self, box, tmp_path):
        box.obtain()
        os.utime(box.csrc / "ops_cpu.cpp", (0, 0))
        box.csrc = box.csrc.rename(tmp_path / "moved here")
        assert box.obtain() == "cache"


@linux
@pytest.mark.build
class TestFailure:
    USE = """
        from pyadv import ops
        x = torch.zeros(2, 3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                moved = ops.linf_step(x, x + 1, x, 0.1, 0.05)
                _native.load()
        assert torch.equal(moved, x + 0.05)
        print(json.dumps([[w.category.__name__, str(w.message)] for w in seen]))
    """

    def warned(self, box: Sandbox, **env: str) -> str:
        """The one warning that using an op gives; the op itself works."""
        ((category, message),) = json.loads(box.run(self.USE, **env)[0])
        assert category == "RuntimeWarning"
        return message

    def test_no_compiler(self, box):
        message = self.warned(box, CXX="/nonexistent")
        assert "CXX=/nonexistent" in message
        assert "install one" in message
        empty = box.folder / "bin"
        empty.mkdir()
        assert "c++, g++ and clang++ are not on PATH" in self.warned(box, CXX="", PATH=str(empty))

    def test_a_compile_error_is_shown_and_remembered(self, box):
        box.write("ops_cpu.cpp", "int broken(\n")
        message = self.warned(box)
        assert "error:" in message
        assert "pyadv.build(force=True)" in message
        (log,) = re.findall(r"\(log: (.*?)\)", message)
        assert "error:" in Path(log).read_text()
        compiled = box.compiled
        assert "remembered from an earlier try" in self.warned(box)
        assert box.compiled == compiled
        box.write("ops_cpu.cpp", "int one();\n")  # a changed source is a new key
        assert json.loads(box.run(self.USE)[0]) == []

    def test_a_forced_build_forgets_the_failure(self, box):
        box.compiler.write_text(
            f'#!/bin/sh\nif [ -e {box.gate} ] && [ "$1" != --version ]; then\n'
            'echo "one.cpp:1:1: error: refused" >&2; exit 1\nfi\nexec c++ "$@"\n'
        )
        box.gate.touch()
        self.warned(box)
        box.gate.unlink()
        self.warned(box)
        code = """
            import pyadv
            with warnings.catch_warnings(record=True):
                _native.load()
            print(_native.status().backend, pyadv.build(force=True).backend)
        """
        assert box.run(code)[0] == "reference native"
        assert not list(box.cache.glob("torch-*/*.failed"))
        assert box.run() == ("cache", "")

    def test_demanded_kernels_raise(self, box):
        box.write("ops_cpu.cpp", "int broken(\n")
        code = """
            for attempt in range(2):
                try:
                    _native.load()
                except _native.NativeError as error:
                    print("error:" in str(error))
        """
        assert box.run(code, PYADV_NATIVE="1")[0] == "True\nTrue"
        assert box.compiled == 2

    def test_build_raises_in_any_mode(self, box):
        box.write("ops_cpu.cpp", "int broken(\n")
        process = box.start("import pyadv; pyadv.build()")
        assert "NativeError" in process.communicate(timeout=60)[1]

    def test_an_undefined_symbol_is_found_when_linking(self, box):
        box.write("cpu/one.cpp", "int other() { return 1; }\n")
        assert "undefined reference to `one()'" in self.warned(box)

    def test_missing_ninja(self, box):
        code = "_build.find_ninja = lambda: None\nwarnings.simplefilter('error')\n"
        code += "try: _native.load()\nexcept RuntimeWarning as warning: print(warning)"
        assert "pip install ninja" in box.run(code)[0]
        assert box.run()[0] == "compiled"  # not remembered, because nothing was compiled

    def test_the_switch_off(self, box):
        assert json.loads(box.run(self.USE, PYADV_NATIVE="0")[0]) == []
        assert not box.cache.exists()

    @pytest.mark.parametrize("name", ["PYADV_NATIVE", "PYADV_CUDA", "PYADV_VERBOSE"])
    def test_unknown_values_are_refused(self, box, name):
        process = box.start("_native.load()", **{name: "yes"})
        assert re.search(
            rf"ValueError: {name} must be one of .*; got 'yes'", process.communicate()[1]
        )

    def test_a_cuda_failure_leaves_the_cpu_kernels(self, box):
        code = """
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                now = _native.load()
            print(now.backend, len(seen), "CUDA" in str(seen[0].message), bool(now.cuda.reason))
        """
        box.write("ops_cuda.cpp", "int broken(\n")
        assert box.run(code, PYADV_CUDA="1")[0] == "native 1 True True"

    def test_an_unusable_cache_folder(self, box):
        blocked = box.folder / "file"
        blocked.touch()
        message = self.warned(box, PYADV_CACHE_DIR=str(blocked / "cache"))
        assert "no cache folder can be written" in message
        assert "PYADV_CACHE_DIR" in message

    def test_an_unusable_home_goes_to_the_temp_folder_with_a_note(self, box):
        blocked, temp = box.folder / "file", box.folder / "temp"
        blocked.touch()
        temp.mkdir()
        out, err = box.run(PYADV_CACHE_DIR="", XDG_CACHE_HOME=str(blocked), TMPDIR=str(temp))
        assert out == "compiled"
        assert f"cannot be written; using {temp}/pyadv-{os.getuid()}" in err


@pytest.fixture
def faked(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox whose compiler is a shell script that compiles nothing."""
    box.fake()
    monkeypatch.setenv("XDG_CACHE_HOME", str(box.folder / "default"))
    monkeypatch.setattr(_native, "_refused", set())
    return box


REFUSED = 'echo "one.cpp:3:7: error: no such thing" >&2; exit 1'


@linux
class TestFailingCompilers:
    def failed(self, box: Sandbox) -> list[Path]:
        return list(box.cache.glob("torch-*/*.failed"))

    def test_a_compiler_that_hangs_is_stopped_with_its_children(self, faked, monkeypatch):
        pids = faked.folder / "pids"
        faked.fake(f"echo $$ >> {pids}; sleep 300 & echo $! >> {pids}; wait")
        monkeypatch.setenv("PYADV_BUILD_TIMEOUT", "1.5")
        with pytest.raises(_build.BuildError, match="longer than 1.5 s.*PYADV_BUILD_TIMEOUT"):
            faked.obtain()
        running = [int(pid) for pid in pids.read_text().split()]
        assert len(running) >= 2
        faked.wait_for(lambda: not any(_alive(pid) for pid in running), seconds=10)
        assert not self.failed(faked)
        faked.fake()
        assert faked.obtain() == "compiled"

    def test_a_version_that_hangs_is_not_waited_for(self, faked, monkeypatch):
        faked.compiler.write_text("#!/bin/bash\nexec sleep 300\n")
        monkeypatch.setattr(_build, "_VERSION_LIMIT", 0.3)
        with pytest.raises(_build.BuildError, match="does not run: `--version` took longer"):
            faked.obtain()

    @pytest.mark.parametrize("given", ["soon", "-1", "nan"])
    def test_a_time_limit_that_is_no_number_is_a_warning(self, faked, monkeypatch, given):
        monkeypatch.setenv("PYADV_BUILD_TIMEOUT", given)
        with pytest.warns(RuntimeWarning, match=f"ignoring PYADV_BUILD_TIMEOUT='{given}'"):
            assert faked.obtain() == "compiled"

    def test_no_time_limit(self, monkeypatch):
        monkeypatch.setenv("PYADV_BUILD_TIMEOUT", "0")
        assert _build.time_limit() is None
        monkeypatch.delenv("PYADV_BUILD_TIMEOUT")
        assert _build.time_limit() == _build.TIME_LIMIT

    @pytest.mark.parametrize(
        "death",
        [
            "kill -9 $$",
            'echo "g++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
            'echo "one.cpp:9:1: internal compiler error: Segmentation fault" >&2; exit 1',
            'echo "/tmp/a.s:1: fatal error: a.o: No space left on device" >&2; exit 1',
            'echo "cc1plus: out of memory allocating 65536 bytes" >&2; exit 1',
            "exit 3",
        ],
    )
    def test_a_compiler_that_dies_is_not_remembered(self, faked, death):
        faked.fake(f"[ -e {faked.gate} ] && {{ {death}; }}")
        faked.gate.touch()
        with pytest.raises(_build.BuildError, match="did not finish"):
            faked.obtain()
        assert not self.failed(faked)
        faked.gate.unlink()
        assert faked.obtain() == "compiled"

    @pytest.mark.parametrize(
        "words",
        [
            "one.cpp:3:7: error: no such thing",
            "kernel.cu(12): error: identifier is undefined",
            "ld: one.o: undefined reference to `two()'",
            "ld.lld: error: undefined symbol: two()",
        ],
    )
    def test_what_the_compiler_says_of_the_sources_is_remembered(self, faked, words):
        faked.fake(f"echo {shlex.quote(words)} >&2; exit 1")
        for match in ("compiling failed", "remembered from an earlier try"):
            with pytest.raises(_build.CompileError, match=match) as raised:
                faked.obtain()
            assert words in str(raised.value)
        (log,) = re.findall(r"\(log: (.*?)\)", str(raised.value))
        assert words in Path(log).read_text()

    def refuse(self, box: Sandbox) -> Path:
        """Make the compiler refuse the sources once and return the record."""
        box.fake(f"[ -e {box.gate} ] && {{ {REFUSED}; }}")
        box.gate.touch()
        with pytest.raises(_build.CompileError):
            box.obtain()
        box.gate.unlink()
        with pytest.raises(_build.CompileError, match="remembered"):
            box.obtain()
        (record,) = self.failed(box)
        return record

    @pytest.mark.parametrize("hours", [25, -1])
    def test_a_failure_is_forgotten_after_a_day(self, faked, hours):
        record = self.refuse(faked)
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "time": time.time() - 3600 * hours}))
        assert faked.obtain() == "compiled"
        assert not record.exists()

    def test_a_failure_is_forgotten_in_another_environment(self, faked, monkeypatch):
        self.refuse(faked)
        monkeypatch.setenv("CPATH", "/somewhere/include")
        assert faked.obtain() == "compiled"

    def test_a_failure_is_forgotten_when_the_compiler_was_replaced(self, faked):
        self.refuse(faked)
        os.utime(faked.compiler, (1e9, 1e9))
        assert faked.obtain() == "compiled"

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"[]", b'{"time": "x"}'])
    def test_a_record_that_cannot_be_read_does_not_count(self, faked, content):
        self.refuse(faked).write_bytes(content)
        assert faked.obtain() == "compiled"

    @pytest.mark.parametrize("given", ["abc", "0", "-2", "1.5", "³"])
    def test_max_jobs_that_is_no_number_is_a_warning(self, faked, monkeypatch, given):
        monkeypatch.setenv("MAX_JOBS", given)
        with pytest.warns(RuntimeWarning, match=f"positive integer; ignoring MAX_JOBS='{given}'"):
            assert faked.obtain() == "compiled"

    def test_max_jobs(self, faked, monkeypatch):
        monkeypatch.setenv("MAX_JOBS", " 1 ")
        most = faked.folder / "most"
        mark = faked.folder / "running"
        faked.fake(f"[ -e {mark} ] && touch {most}; touch {mark}; sleep 0.3; rm {mark}")
        assert faked.obtain() == "compiled" and not most.exists()

    def test_builders_without_file_locks_take_the_first_result(self, faked, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(_cache.fcntl, "flock", refuse)
        faked.gate.touch()
        faked.fake(f"while [ -e {faked.gate} ]; do sleep 0.05; done")
        results: list[object] = []

        def build() -> None:
            try:
                results.append(faked.obtain())
            except Exception as error:
                results.append(error)

        builders = [threading.Thread(target=build) for _ in range(6)]
        for builder in builders:
            builder.start()
        faked.wait_for(lambda: faked.compiled >= 6)
        faked.gate.unlink()
        for builder in builders:
            builder.join()
        assert results == ["compiled"] * 6
        assert faked.obtain() == "cache"
        assert not list(faked.cache.glob("torch-*/*.tmp*"))

    def test_a_child_forked_during_a_build_takes_its_result(self, faked):
        faked.gate.touch()
        faked.fake(f"while [ -e {faked.gate} ]; do sleep 0.05; done")
        builder = threading.Thread(target=faked.obtain)
        builder.start()
        faked.wait_for(lambda: faked.compiled > 0)
        child = _fork(lambda: faked.obtain() == "cache")
        time.sleep(0.5)  # the child reaches the lock
        faked.gate.unlink()
        builder.join()
        ended: list[tuple[int, int]] = []

        def over() -> bool:
            ended.append(os.waitpid(child, os.WNOHANG))
            return ended[-1][0] != 0

        try:
            faked.wait_for(over, seconds=20)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        assert os.waitstatus_to_exitcode(ended[-1][1]) == 7

    def test_a_child_does_not_keep_a_lock_of_its_parent(self, faked):
        entry = faked.cache / "version" / "entry"
        _cache.prepare(entry.parent)

        def closed(descriptor: int) -> bool:
            try:
                os.fstat(descriptor)
            except OSError:
                return True
            return False

        with _cache.lock(entry, print) as held:
            assert held
            (descriptor,) = _cache._locks
            child = _fork(lambda: closed(descriptor))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    def test_waiting_for_a_lock_ends(self, faked, monkeypatch):
        monkeypatch.setenv("PYADV_BUILD_TIMEOUT", "0.3")
        entry = faked.cache / "version" / "entry"
        _cache.prepare(entry.parent)
        with (
            _cache.lock(entry, print),
            pytest.raises(_build.BuildError, match=f"process {os.getpid()} on .* has held"),
            _cache.lock(entry, print),
        ):
            pass

    @pytest.mark.parametrize("how", ["none", "closed", "broken"])
    def test_a_stderr_that_is_gone_does_not_matter(self, faked, monkeypatch, capsys, how):
        class Broken(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError(errno.EPIPE, "broken")

        closed = io.StringIO()
        closed.close()
        stream = {"none": None, "closed": closed, "broken": Broken()}[how]
        monkeypatch.setenv("MAX_JOBS", "abc")  # also gives a warning
        monkeypatch.setenv("PYADV_VERBOSE", "1")

        def show(message: Warning, *_: object) -> None:  # pytest would not reach stderr
            if sys.stderr is not None:
                sys.stderr.write(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", show)
            monkeypatch.setattr(sys, "stderr", stream)
            assert faked.obtain() == "compiled"
        assert capsys.readouterr().out == ""

    def test_a_ninja_in_the_current_folder_is_not_run(self, faked, monkeypatch):
        trap = faked.folder / "trap"
        trap.mkdir()
        (trap / "ninja.py").write_text(f"open({str(faked.folder / 'ran')!r}, 'w')\n")
        monkeypatch.chdir(trap)
        assert faked.obtain() == "compiled"
        assert not (faked.folder / "ran").exists()


def _fork(check) -> int:
    """Fork a child that exits with 7 if `check` holds, and return its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads
        child = os.fork()
    if child == 0:
        try:
            os._exit(7 if check() else 1)
        finally:
            os._exit(2)
    return child


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@linux
class TestCompilerCommands:
    @pytest.mark.parametrize(
        "command",
        ["nice {}", "nice -n 1 {}", "env A=1 {}", "./cxx", "../{name}/cxx", "{} -ffast-math"],
    )
    def test_flags_and_wrappers_work(self, faked, monkeypatch, command):
        monkeypatch.chdir(faked.folder)
        command = command.format(faked.compiler, name=faked.folder.name)
        monkeypatch.setenv("CXX", command)
        assert faked.obtain() == "compiled"
        assert faked.compiled == 3  # two sources and the link
        assert faked.obtain() == "cache"

    @pytest.mark.build
    def test_fast_math_in_the_command_is_undone(self, box, monkeypatch):
        """The kernels must equal the reference, and loading them must not change the process."""
        command = "c++ -ffast-math"
        fast = box.folder / "fast.so"
        box.write("cpu/one.cpp", "int one() { return 1; }\n")
        subprocess.run([*command.split(), "-shared", "-fPIC", "-o", fast, box.csrc / "cpu/one.cpp"])
        start_up = b"set_fast_math"  # what the linker adds
        if not fast.exists() or start_up not in fast.read_bytes():
            pytest.skip("this compiler adds nothing")
        box.write("cpu/one.cpp", "#ifdef __FAST_MATH__\n#error\n#endif\nint one() { return 1; }\n")
        monkeypatch.setenv("CXX", command)
        assert box.obtain() == "compiled"
        assert start_up not in (box.entry / "_ops.so").read_bytes()

    def test_every_word_of_the_command_counts(self, faked, monkeypatch):
        keys = []
        for command in ("{}", "{} -ffast-math", "{} -m32", "nice {}", "env A=1 {}", "env A=2 {}"):
            monkeypatch.setenv("CXX", command.format(faked.compiler))
            keys.append(_build.plan_cpu(faked.csrc, TORCH).key)
        assert len(set(keys)) == len(keys)

    def test_the_content_of_a_script_counts_and_its_folder_does_not(self, faked, monkeypatch):
        key = _build.plan_cpu(faked.csrc, TORCH).key
        other = faked.folder / "elsewhere" / "cxx"
        other.parent.mkdir()
        other.write_text(faked.compiler.read_text())
        other.chmod(0o755)
        monkeypatch.setenv("CXX", str(other))
        assert _build.plan_cpu(faked.csrc, TORCH).key == key
        other.write_text(other.read_text() + "# -ffast-math\n")
        assert _build.plan_cpu(faked.csrc, TORCH).key != key

    def test_a_plain_compiler_has_no_command_in_its_key(self, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        command, missing = _build.compiler()
        if missing:
            pytest.skip("no compiler")
        assert set(_build._tools(command)) == {"compiler"}

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ('g++ "x', 'CXX=g++ "x is not a command: no closing quotation'),
            ("env A=1 /nonexistent/g++", "does not run"),
            ("/nonexistent/g++", "CXX=/nonexistent/g++ does not run"),
            ("'' -O2", "does not run"),
        ],
    )
    def test_a_command_that_does_not_run_is_named(self, faked, monkeypatch, command, words):
        monkeypatch.setenv("CXX", command)
        with pytest.raises(_build.BuildError) as raised:
            faked.obtain()
        assert words in str(raised.value) and "set CXX" in str(raised.value)
        assert _build.find_compiler() is None
        assert "compiler" in _native.report()

    def test_nvcc_gets_the_program_and_not_a_folder_of_a_flag(self, faked, monkeypatch):
        if _build.find_cuda() is None:
            pytest.skip("no CUDA toolkit")
        faked.write("cuda/kernel.cu", "")
        monkeypatch.setenv("CXX", f"nice {faked.compiler} -isystem /usr")
        plan = _build.plan_cuda(faked.csrc, TORCH)
        (device,) = (command for source, command in plan.compile if source.suffix == ".cu")
        assert f"-ccbin={faked.compiler}" in device

    def test_variables_that_nvcc_reads_count(self, faked, monkeypatch):
        key = _build.plan_cuda(faked.csrc, TORCH).key
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "--use_fast_math")
        assert _build.plan_cuda(faked.csrc, TORCH).key != key


@linux
class TestTrust:
    """Nobody else can make this process load a library."""

    def refused(self, box: Sandbox, match: str) -> None:
        """Check that the cache is refused with one warning and that the default serves instead."""
        with pytest.warns(RuntimeWarning, match=match) as seen:
            assert box.obtain() == "compiled"
            assert box.obtain() == "cache"
        assert len(seen) == 1
        text = str(seen[0].message)
        assert f"PYADV_CACHE_DIR={os.environ['PYADV_CACHE_DIR']}" in text
        assert f"Using {box.folder / 'default' / 'pyadv'} instead" in text

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
    def test_a_folder_that_others_can_write_to(self, faked, mode):
        faked.obtain()
        faked.cache.chmod(mode)
        self.refused(faked, rf"mode 0?{mode:o}.*chmod go-w {faked.cache}")

    def test_a_folder_of_another_user(self, faked):
        faked.obtain()
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(faked.cache, 12345, -1)
        self.refused(faked, r"belongs to another user \(uid 12345\); set PYADV_CACHE_DIR")

    def test_a_link(self, faked, monkeypatch):
        faked.obtain()
        link = faked.folder / "link"
        link.symlink_to(faked.cache)
        monkeypatch.setenv("PYADV_CACHE_DIR", str(link))
        self.refused(faked, "is a symbolic link")

    def test_a_folder_below_one_that_others_can_write_to(self, faked, monkeypatch):
        shared = faked.folder / "shared"
        shared.mkdir()
        monkeypatch.setenv("PYADV_CACHE_DIR", str(shared / "mine" / "cache"))
        shared.chmod(0o1777)  # as /tmp is: others cannot move what they do not own
        assert faked.obtain() == "compiled"
        shared.chmod(0o777)
        self.refused(faked, f"{shared} above it can be written by other users")

    def test_a_link_above_the_cache_is_followed(self, faked, monkeypatch):
        """On clusters ~/.cache is often a link that the user made."""
        real = faked.folder / "scratch"
        real.mkdir(mode=0o700)
        (faked.folder / "home").symlink_to(real)
        monkeypatch.setenv("PYADV_CACHE_DIR", str(faked.folder / "home" / "cache"))
        assert faked.obtain() == "compiled"
        assert (real / "cache").is_dir() and _cache.roots()[0] == [real / "cache"]

    def test_a_user_that_does_not_exist(self, faked, monkeypatch):
        monkeypatch.setenv("PYADV_CACHE_DIR", "~nouser/cache")
        self.refused(faked, "PYADV_CACHE_DIR=~nouser/cache: .*home directory")

    def test_defaults_are_examined_too(self, faked, monkeypatch):
        temp = faked.folder / "temp"
        monkeypatch.delenv("PYADV_CACHE_DIR")
        monkeypatch.setattr("tempfile.tempdir", str(temp))
        for folder in (faked.folder / "default" / "pyadv", temp / f"pyadv-{os.geteuid()}"):
            folder.mkdir(parents=True)
            folder.chmod(0o777)
        with pytest.raises(_build.BuildError, match="no cache folder can be used: XDG_CACHE_HOME"):
            faked.obtain()
        (temp / f"pyadv-{os.geteuid()}").chmod(0o700)
        with pytest.warns(RuntimeWarning, match="chmod go-w .*default/pyadv"):
            assert faked.obtain() == "compiled"

    def test_a_folder_for_temporary_files_that_protects_nothing(self, faked, monkeypatch):
        temp, blocked = faked.folder / "temp", faked.folder / "file"
        temp.mkdir()
        temp.chmod(0o777)
        blocked.touch()
        monkeypatch.setattr("tempfile.tempdir", str(temp))
        monkeypatch.delenv("PYADV_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked / "x"))
        words = f"no cache folder can be written .*{temp} above it can be written by other users"
        with pytest.raises(_build.BuildError, match=words):
            faked.obtain()
        assert not list(temp.iterdir())

    def test_a_fallback_that_is_not_needed_gives_no_warning(self, faked, monkeypatch):
        """Anybody can create a folder under /tmp; that must not worry those who do not use it."""
        temp = faked.folder / "temp"
        (temp / f"pyadv-{os.geteuid()}").mkdir(parents=True)
        (temp / f"pyadv-{os.geteuid()}").chmod(0o777)
        monkeypatch.setattr("tempfile.tempdir", str(temp))
        monkeypatch.delenv("PYADV_CACHE_DIR")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert faked.obtain() == "compiled"

    def test_a_loop_of_links(self, faked, monkeypatch):
        loop = faked.folder / "loop"
        loop.symlink_to(loop)
        monkeypatch.setenv("PYADV_CACHE_DIR", str(loop / "cache"))
        self.refused(faked, "loop")

    def test_the_private_group_of_the_user_may_own_folders_above(self, faked, monkeypatch):
        """Some systems create home folders that are writable for such a group."""
        home = faked.folder / "home"
        home.mkdir()
        home.chmod(0o775)
        monkeypatch.setenv("PYADV_CACHE_DIR", str(home / "cache"))
        monkeypatch.setattr(_cache, "_private", lambda group: True)
        assert _cache.roots()[0] == [home / "cache"]
        home.chmod(0o777)
        assert _cache.roots()[1]
        home.chmod(0o775)
        monkeypatch.setattr(_cache, "_private", lambda group: False)
        assert _cache.roots()[1]

    def test_a_relative_cache_home_is_ignored(self, faked, monkeypatch):
        monkeypatch.delenv("PYADV_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        monkeypatch.chdir(faked.folder)
        assert all("here" not in root.parts for root in _cache.roots()[0])

    @pytest.mark.parametrize("what", ["entry", "_ops.so", "manifest.json"])
    @pytest.mark.parametrize("how", ["link", "mode", "owner"])
    def test_an_entry_that_others_could_have_written_is_built_again(self, faked, what, how):
        faked.obtain()
        path = faked.entry if what == "entry" else faked.entry / what
        if how == "link":
            moved = path.rename(faked.folder / "planted")
            path.symlink_to(moved)
        elif how == "mode":
            path.chmod(0o777)
        elif os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            pytest.skip("only root can give a file away")
        assert faked.obtain() == "compiled"
        assert faked.obtain() == "cache"

    def test_a_link_in_place_of_the_folder_of_a_version(self, faked):
        faked.obtain()
        (version,) = faked.cache.glob("torch-*")
        version.rename(faked.folder / "planted")
        version.symlink_to(faked.folder / "planted")
        with pytest.raises(
            _build.BuildError, match=f"{re.escape(str(version))} is a symbolic link"
        ):
            faked.obtain()

    @pytest.mark.parametrize(
        ("suffix", "message"),
        [(".lock", "is a symbolic link; remove it"), (".failed", "compiling failed")],
    )
    def test_links_beside_an_entry_are_not_followed(self, faked, suffix, message):
        victim = faked.folder / "victim"
        victim.write_text("precious")
        faked.fake(REFUSED)
        entry = _cache.entry(faked.cache, _build.plan_cpu(faked.csrc, _build.this_torch()))
        _cache.prepare(entry.parent)
        _cache.beside(entry, suffix).symlink_to(victim)
        with pytest.raises(_build.BuildError, match=message):
            faked.obtain()
        assert victim.read_text() == "precious"

    def test_everything_in_the_cache_is_private(self, faked):
        before = os.umask(0)
        try:
            assert faked.obtain() == "compiled"
        finally:
            os.umask(before)
        (version,) = faked.cache.glob("torch-*")
        for path in (faked.cache, version, *version.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
        assert faked.obtain() == "cache"

    def test_a_cache_of_root_serves_everybody(self, faked, monkeypatch):
        """A container image may hold a cache that root has filled."""
        faked.obtain()
        if os.stat(faked.cache).st_uid != 0:
            pytest.skip("only root can make a cache of root's")
        monkeypatch.setattr(_cache.os, "geteuid", lambda: 12345)
        assert faked.obtain() == "cache"


class TestKey:
    def plan(self, box: Sandbox, torch: _build.Torch = TORCH) -> _build.Plan:
        return _build.plan_cpu(box.csrc, torch)

    def test_every_byte_and_name_counts(self, box):
        keys = [self.plan(box).key]
        box.write("cpu/one.cpp", "int one() { return 41; }\n")
        keys.append(self.plan(box).key)
        (box.csrc / "cpu/one.cpp").rename(box.csrc / "cpu/two.cpp")
        keys.append(self.plan(box).key)
        keys.append(self.plan(box, _build.Torch("2.11.0", None, Path("torch"))).key)
        assert len(set(keys)) == 4

    def test_flags_and_compiler_count(self, box, monkeypatch):
        keys = [self.plan(box).key]
        monkeypatch.setattr(_build, "HOST_FLAGS", [*_build.HOST_FLAGS, "-g"])
        keys.append(self.plan(box).key)
        monkeypatch.setattr(_build, "identity", lambda *command: "another compiler")
        keys.append(self.plan(box).key)
        assert len(set(keys)) == 3

    def test_each_library_has_its_own_sources(self, box):
        cpu, cuda = self.plan(box).key, _build.plan_cuda(box.csrc, TORCH).key
        box.write("cuda/kernel.cu", "")
        assert self.plan(box).key == cpu
        assert _build.plan_cuda(box.csrc, TORCH).key != cuda
        cuda = _build.plan_cuda(box.csrc, TORCH).key
        box.write("cpu/three.cpp", "")
        box.write("module.cpp", "")
        assert _build.plan_cuda(box.csrc, TORCH).key == cuda
        assert self.plan(box).key != cpu

    def test_notes_do_not_count(self, box):
        key = self.plan(box).key
        box.write("README.md", "notes")
        assert self.plan(box).key == key

    @pytest.mark.parametrize(
        ("version", "standard"),
        [("2.11.0", "17"), ("2.12.1+cu130", "17"), ("2.13.0+cpu", "20"), ("3.0.0a0", "20")],
    )
    def test_standard_follows_the_headers(self, version, standard):
        assert _build.Torch(version, None, Path()).standard == f"-std=c++{standard}"


class TestCuda:
    @pytest.mark.parametrize(
        ("named", "cards", "expected"),
        [
            ("8.0;9.0+PTX", (), ("8.0", "9.0+PTX")),
            ("7.5 9.0a", ("8.6",), ("7.5", "9.0a")),
            ("", ("8.6", "9.0"), ("8.6", "9.0")),
            ("", (), _build.DEFAULT_ARCHITECTURES),
        ],
    )
    def test_architectures(self, monkeypatch, named, cards, expected):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
        monkeypatch.setattr(_build, "visible_cards", lambda: cards)
        assert _build.architectures() == expected

    def test_unknown_architecture(self, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
        with pytest.raises(_build.BuildError, match="TORCH_CUDA_ARCH_LIST.*'Hopper'"):
            _build.architectures()

    def test_code_for_each_architecture(self):
        assert _build._gencode(["8.0", "9.0a+PTX"]) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90a,code=compute_90a",
        ]

    @pytest.mark.parametrize(
        ("compiled", "card", "runs"),
        [
            (("8.0",), "8.6", True),
            (("8.6",), "8.0", False),
            (("8.0",), "9.0", False),
            (("8.0+PTX",), "9.0", True),
            (("9.0", "8.0"), "8.9", True),
            (("9.0+PTX",), "8.0", False),
            (("9.0a+PTX",), "9.0", True),
            (("9.0a+PTX",), "10.0", False),
            (("9.0+PTX",), "12.0", True),
        ],
    )
    def test_which_cards_are_served(self, compiled, card, runs):
        assert _build.serves(compiled, card) is runs

    @pytest.mark.skipif(_build.find_cuda() is None, reason="no CUDA toolkit")
    def test_another_major_version_is_refused(self, box):
        plan = _build.plan_cuda(box.csrc, _build.Torch("2.11.0+cu80", "8.0", Path("torch")))
        assert "PyTorch was built for CUDA 8.0" in plan.problem

    @pytest.mark.build
    @pytest.mark.skipif(_build.find_cuda() is None, reason="no CUDA toolkit")
    def test_compiles_kernels_and_shares_the_runtime(self, box, tmp_path):
        """No card is needed to compile; the library must ask for PyTorch's own CUDA runtime."""
        box.write(
            "cuda/kernel.cu",
            "#include <cuda_runtime.h>\n__global__ void empty() {}\n"
            "int launch() { empty<<<1, 1>>>(); return cudaGetLastError(); }\n",
        )
        plan = _build.plan_cuda(box.csrc, _build.this_torch())
        (library,) = _build.build([plan], tmp_path / "work")
        assert re.search(rb"libcudart\.so\.\d+\0", library.read_bytes())


@linux
@pytest.mark.build
def test_a_second_build_compiles_only_what_changed(box, tmp_path):
    work, plan = tmp_path / "work with spaces", _build.plan_cpu(box.csrc, _build.this_torch())
    _build.build([plan], work)
    times = {path.name: path.stat().st_mtime_ns for path in (work / "cpu").glob("*.o")}
    assert sorted(times) == ["cpu-one.o", "csrc-ops_cpu.o"]
    box.write("common/answer.h", "#define ANSWER 44\n")
    _build.build([plan], work)
    changed = {p.name for p in (work / "cpu").glob("*.o") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"cpu-one.o"}


def test_report_says_what_runs():
    text = _native.report()
    for word in ("backend", "CPU kernels", "torch", "compiler", "cache", "PYADV_NATIVE"):
        assert word in text


def test_import_costs_little(tmp_path):
    """Importing pyadv takes at most a quarter of the processor's time that importing PyTorch takes
    (the best of three, after a first run that leaves bytecode, as an installation does), and leaves
    out what a training loop does without."""
    code = """
        import sys, time
        begin = time.process_time()
        import torch
        middle = time.process_time()
        import pyadv
        from pyadv import ops, reference
        share = (time.process_time() - middle) / (middle - begin)
        heavy = ("torch._dynamo", "triton", "pyadv.evaluation")
        print(share, *(name in sys.modules for name in heavy))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    settings = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    _, *runs = [subprocess.run(command, **settings) for _ in range(4)]
    share, *heavy = min((run.stdout.split() for run in runs), key=lambda words: float(words[0]))
    assert heavy == ["False"] * 3
    assert float(share) < 0.25
