"""Compiling at the first use: once, for everyone, whatever goes wrong.

Each case has a tiny source tree and a private cache, and processes of its own wherever loading,
warnings or races are concerned; the real kernels are tested by everything else.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyadv import _build, _native

ROOT = Path(_build.__file__).parent.parent
TORCH = _build.Torch("2.13.0+cpu", None, Path("torch"))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="native needs Linux")


class Sandbox:
    """A source tree, a cache and a compiler that notes each time it compiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csrc = folder / "csrc"
        self.cache = folder / "cache"
        self.calls = folder / "calls"
        self.gate = folder / "gate"  # while it exists the compiler hangs
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
            from pyadv import _build, _native
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
        """Where the library comes from, asked in this process, without loading it."""
        plan = _build.plan_cpu(self.csrc, _build.this_torch())
        return _native._from_cache(plan, force=False).source

    @property
    def compiled(self) -> int:
        """How many source files were compiled so far (a whole build is two)."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    @property
    def entry(self) -> Path:
        (manifest,) = self.cache.glob("torch-*/cpu-*/manifest.json")
        return manifest.parent

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
        waiter = box.start("_native._PATIENCE = 0.1; _native.load()")
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
            f'#!/bin/sh\n[ -e {box.gate} ] && [ "$1" != --version ] && exit 1\nexec c++ "$@"\n'
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
        assert box.run()[0] == "compiled"  # not remembered: nothing was compiled in vain

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
    """Beyond PyTorch itself: at most 0.2 s of the processor's time (the best of three, after a
    first one that leaves bytecode, as an installation does)."""
    code = """
        import time, torch, sys
        begin = time.process_time()
        import pyadv
        from pyadv import ops, reference
        print(time.process_time() - begin, "torch._dynamo" in sys.modules, "triton" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    settings = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    _, *runs = [subprocess.run(command, **settings) for _ in range(4)]
    seconds, *heavy = min((run.stdout.split() for run in runs), key=lambda words: float(words[0]))
    assert heavy == ["False", "False"]
    assert float(seconds) < 0.2
