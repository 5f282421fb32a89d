"""`graph="auto"`: a replay gives the result of the eager steps.

On the CPU a stand-in replaces the recorder, so that everything around a recording is tested. The
tests marked `cuda` record CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import random
import threading
import weakref
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyadv.attacks import APGD, MIFGSM, PGD, FriendlyPGD, TargetedAPGD
from pyadv.engine.graphs import Graphs
from pyadv.passes import record
from tests.networks import ConvNet


class Replayer:
    """A recorder that keeps the work and replays it by running it again into the same result."""

    waits = False

    def __init__(self, device):
        self.log = []

    def watch(self, work):
        return work(), self.waits

    def record(self, work):
        result = work()

        def replay():
            self.log.append("replay")
            for name, value in vars(work()).items():
                getattr(result, name).copy_(value)

        return replay, result

    @contextlib.contextmanager
    def turn(self):
        self.log.append("begin")
        yield
        self.log.append("end")


@pytest.fixture
def replayer(monkeypatch):
    """Return the stand-in, which is the recorder of the CPU during a test."""
    found = Replayer("cpu")
    monkeypatch.setitem(record.RECORDERS, "cpu", lambda device: found)
    monkeypatch.setattr(record, "_recorders", {})
    return found


# settings under which no step reads a value
FREE = {"validate": False, "compact": False, "seed": 0}


def batch(n=4, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 6, 6, generator=generator)
    y = torch.randint(4, (n,), generator=generator)
    return x.to(device), y.to(device)


def network(device="cpu"):
    torch.manual_seed(0)
    return ConvNet().to(device).eval()


def same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other), name


ATTACKS = {
    "PGD": lambda **k: PGD(steps=3, **k),
    "in a batch's statistics": lambda **k: PGD(steps=3, bn="train", **k),
    "L2, per sample": lambda **k: PGD(
        norm="L2", steps=3, eps=torch.linspace(0.1, 1, 4, device=k.pop("on", None)), alpha=0.1, **k
    ),
    "L1": lambda **k: PGD(norm="L1", steps=3, eps=3.0, alpha=1.0, **k),
    "TRADES": lambda **k: PGD(steps=3, loss="kl", **k),
    "as the official codes": lambda **k: PGD(
        steps=3, loss="dlr", grad_mode="autograd", start="uniform", **k
    ),
    "friendly": lambda **k: FriendlyPGD(steps=4, tau=1, omega=0.01, **k),
    "momentum": lambda **k: MIFGSM(steps=3, **k),
    "restarts": lambda **k: PGD(steps=3, restarts=3, best="fooled", **k),
    "expectation": lambda **k: PGD(steps=2, eot=2, **k),
    "APGD": lambda **k: APGD(steps=8, **k),
    "APGD, L1": lambda **k: APGD(norm="L1", eps=3.0, steps=10, **k),
    "targets": lambda **k: TargetedAPGD(steps=4, targets=2, **k),
    "at speed": lambda **k: PGD(steps=3, speed="fast", **k),
}
every = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)


def agree(make, device="cpu", model=None, form=lambda x: x):
    """Compare graphed with eager attacks, return the graphs, and change inputs and weights each
    time.

    Radii change once.
    """
    model = model or network(device)
    more = {**FREE, "on": device} if make is ATTACKS["L2, per sample"] else FREE
    plain, graphed = make(graph=False, **more), make(graph="auto", **more)
    if model.training:
        model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for call in range(6):
        x, y = batch(seed=call, device=device)
        x = form(x)
        if call == 4 and not isinstance(plain.settings.eps, torch.Tensor):
            for attack in (plain, graphed):
                smaller = {"eps": 0.5 * attack.settings.eps, "alpha": 0.5 * attack.settings.alpha}
                attack.settings = replace(attack.settings, **smaller)
        state = torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None
        expected = plain.perturb(x, y, model=model)
        torch.set_rng_state(state[0])
        if x.is_cuda:
            torch.cuda.set_rng_state(state[1])
        same(graphed.perturb(x, y, model=model), expected)
        optimizer.zero_grad()
        F.cross_entropy(model(expected.x_adv), y).backward()
        optimizer.step()
    return graphed.graphs


@every
def test_a_replay_gives_what_the_steps_give(make, replayer):
    graphs = agree(make)
    assert graphs.why is None
    # every call but the first two of a kind is a replay
    assert graphs.replayed >= 4 * graphs.recorded > 0
    assert replayer.log == ["begin", "replay", "end"] * graphs.replayed


def calls(attack, model, *seeds, n=4):
    for seed in seeds:
        x, y = batch(n, seed)
        same(attack.perturb(x, y, model=model, draw=0), plain(attack, model, x, y))


def plain(attack, model, x, y):
    other = copy.copy(attack)
    other.settings, other.graphs = attack.settings, Graphs(False)
    return other.perturb(x, y, model=model, draw=0)


class Scaled(nn.Module):
    """A model that reads attributes and buffers besides its parameters."""

    def __init__(self):
        super().__init__()
        self.inside, self.temperature, self.shift = network(), 1.0, torch.zeros(4)

    def forward(self, x):
        return self.inside(x) / self.temperature + self.shift


def replace_parameter(model):
    model.inside.head.weight = nn.Parameter(model.inside.head.weight.detach() * 2)


def replace_data(model):
    model.inside.head.weight.data = model.inside.head.weight.detach() * 2


def replace_layer(model):
    model.inside.body[2] = nn.Tanh()


CHANGES = {
    "an attribute": lambda model: setattr(model, "temperature", 0.5),
    "a tensor attribute": lambda model: setattr(model, "shift", torch.randn(4)),
    "a parameter": replace_parameter,
    "a parameter's data": replace_data,
    "a layer": replace_layer,
    "a mode": lambda model: model.inside.body[1].train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_as_it_was_is_recorded_anew(change, replayer):
    model, attack = Scaled().eval(), PGD(steps=2, bn="as_is", **FREE)
    calls(attack, model, 0, 1, 2)
    assert attack.graphs.replayed == 1
    change(model)
    calls(attack, model, 3, 4, 5)
    assert attack.graphs.replayed == 2 and attack.graphs.recorded == 2


def test_other_settings_shapes_and_arithmetic_are_recorded_anew(replayer):
    model, attack = network(), PGD(steps=2, **FREE)
    calls(attack, model, 0, 1, 2)
    calls(attack, model, 3, n=3)  # a smaller last batch
    assert attack.graphs.replayed == 1 and "first of its kind" in attack.graphs.why
    calls(attack, model, 4)
    assert attack.graphs.replayed == 2
    attack.settings = replace(attack.settings, steps=3)
    calls(attack, model, 5)
    with torch.autocast("cpu", torch.bfloat16):
        calls(attack, model, 6, 7, 8)
    assert attack.graphs.replayed == 3
    x, y = batch()
    attack.perturb(x.contiguous(memory_format=torch.channels_last), y, model=model)
    assert attack.graphs.replayed == 3


class Strange(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.inside, self.act, self.calls = network(), act, 0

    def forward(self, x):
        return self.act(self, x) + self.inside(x)


def count(self, x):
    self.calls += 1
    return 0


STRANGE = {
    "changes its own attributes": count,
    "draws random numbers": lambda self, x: float(torch.rand(())) * 1e-3,
    "draws random numbers on": lambda self, x: random.random() * 1e-3,
    "draws random numbers on the host": lambda self, x: np.random.rand() * 1e-3,
}


@pytest.mark.parametrize("why, act", STRANGE.items(), ids=STRANGE)
def test_a_model_that_a_replay_would_not_follow(why, act, replayer, caplog):
    model, attack = Strange(act), PGD(steps=2, **FREE)
    x, y = batch()
    with caplog.at_level(logging.INFO, "pyadv"):
        for _ in range(4):
            attack.perturb(x, y, model=model)
    assert why in attack.graphs.why and len(caplog.messages) == 1
    assert attack.graphs.recorded == attack.graphs.replayed == 0
    sure = PGD(steps=2, graph=True, **FREE)
    sure.perturb(x, y, model=model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=why):
            sure.perturb(x, y, model=model)


def test_waiting_for_the_device_and_what_a_recording_refuses(replayer, monkeypatch):
    model, attack = network(), PGD(steps=2, **FREE)
    replayer.waits = True
    calls(attack, model, 0, 1, 2)
    assert "waits for the device" in attack.graphs.why and not attack.graphs.recorded

    def refuse(work):
        raise torch.AcceleratorError("operation not permitted")

    replayer.waits, attack = False, PGD(steps=2, **FREE)
    monkeypatch.setattr(replayer, "record", refuse)
    calls(attack, model, 0, 1, 2)
    assert attack.graphs.why == "AcceleratorError: operation not permitted"


def hooked():
    model = network()
    model.head.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def margin(logits, y):
    return -logits.gather(1, y[:, None])[:, 0]


OBSTACLES = {
    "hooks": (hooked, {}),
    "torch.nn.Module": (lambda: network().forward, {}),
    "values": (network, {"validate": True}),
    "leave the batch": (network, {"best": "fooled", "compact": True}),
    "more than 200": (network, {"steps": 201}),
    "callable": (network, {"loss": margin}),
    "nothing to do": (network, {"steps": 0}),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_obstacles(why, replayer):
    make, settings = OBSTACLES[why]
    model, (x, y) = make(), batch(2)
    attack = PGD(**{**FREE, "steps": 2, **settings})
    for _ in range(3):
        attack.perturb(x, y, model=model)
    assert why in attack.graphs.why and not attack.graphs.recorded
    sure = PGD(graph=True, **{**FREE, "steps": 2, **settings})
    if why in ("callable", "more than 200"):  # graph=True records it anyway
        for _ in range(3):
            expected = attack.perturb(x, y, model=model, draw=0)
            same(sure.perturb(x, y, model=model, draw=0), expected)
        assert sure.graphs.replayed == 1
    else:
        with pytest.raises(ValueError, match=f"graph=True: .*{why}"):
            sure.perturb(x, y, model=model)


def test_where_there_are_no_graphs():
    (x, y), model = batch(), network()
    attack = PGD(model, steps=2)
    attack(x, y)
    assert attack.graphs.why == "graphs are for CUDA, and x is on cpu"
    with pytest.raises(ValueError, match="graph=True: graphs are for CUDA"):
        PGD(model, steps=2, graph=True)(x, y)
    with pytest.raises(ValueError, match="graph must be one of auto, True, False, got 'yes'"):
        PGD(graph="yes")


def test_recordings_end_with_the_model(replayer, monkeypatch):
    monkeypatch.setattr(replayer, "record", lambda work: (lambda: None, work()))
    model, attack = network(), PGD(steps=2, **FREE)
    model.act = model.forward  # as some wrappers store it
    for seed in (0, 1, 2):
        attack.perturb(*batch(seed=seed), model=model)
    assert attack.graphs.replayed == 1
    result = weakref.ref(attack.graphs._of[model][0].result.kappa)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and result() is None


def test_only_the_last_kinds_are_kept(replayer):
    model, attack = network(), PGD(steps=1, **FREE)
    for n in range(1, 12):
        for seed in (0, 1):
            attack.perturb(*batch(n, seed), model=model)
    assert len(attack.graphs._of[model]) == 8
    before = attack.graphs.replayed
    attack.perturb(*batch(11), model=model)
    attack.perturb(*batch(1), model=model)
    assert attack.graphs.replayed == before + 1


def test_copies_start_without_recordings(replayer):
    model, attack = network(), PGD(steps=2, **FREE)
    calls(attack, model, 0, 1, 2)
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert not other.graphs.recorded and other.graphs.mode == "auto"
        calls(other, model, 0, 1, 2)
        assert other.graphs.replayed == 1


def test_under_no_grad_and_inference_mode(replayer):
    model, attack = network(), PGD(steps=2, **FREE)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            calls(attack, model, 0, 1)
    assert attack.graphs.replayed == 4


def test_threads_take_turns(replayer):
    model, attack = network(), PGD(steps=3, **FREE)
    calls(attack, model, 0, 1)
    expected = {s: plain(attack, model, *batch(seed=s)) for s in range(4)}
    wrong = []

    def work(seed):
        for _ in range(10):
            found = attack.perturb(*batch(seed=seed), model=model, draw=0)
            wrong.extend([] if torch.equal(found.x_adv, expected[seed].x_adv) else [seed])

    threads = [threading.Thread(target=work, args=(s,)) for s in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and attack.graphs.replayed == 40
    assert replayer.log == ["begin", "replay", "end"] * 40


def test_what_is_asked_of_cuda(monkeypatch):
    """The recorder calls CUDA in this order and restores its state after a recording that fails."""
    log, generator = [], Mock()

    class Graph:
        refused = False

        def capture_begin(self, pool, capture_error_mode):
            log.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            log.append("end")
            if self.refused:
                raise RuntimeError("refused")

        def pool(self):
            return "shared"

        def replay(self):
            log.append("replay")

    for name in ("Stream", "Event", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch, "Generator", lambda device: Mock())
    recorder = record.CudaRecorder(torch.device("cuda", 0))
    replay, result = recorder.record(lambda: log.append("work") or 5)
    replay()
    # the second recording uses the pool of the first while that exists
    recorder.record(lambda: None)
    first, second = (("begin", pool, "thread_local") for pool in ("new", "shared"))
    assert log == [first, "work", "end", "replay", second, "end"] and result == 5
    Graph.refused = True
    with pytest.raises(RuntimeError, match="refused"):
        recorder.record(lambda: None)
    assert generator.graphsafe_set_state.call_count == 1 and len(record._failed) == 1
    record._failed.clear()


# Tests on a GPU.


@pytest.fixture
def repeatable():
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


@pytest.mark.cuda
@every
def test_on_a_card(make, repeatable):
    graphs = agree(make, "cuda")
    assert graphs.why is None and graphs.replayed >= 4 * graphs.recorded > 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_on_a_card(dtype, repeatable):
    with torch.autocast("cuda", dtype):
        graphs = agree(ATTACKS["PGD"], "cuda")
    assert graphs.replayed == 4


@pytest.mark.cuda
def test_channels_last_on_a_card(repeatable):
    def form(x):
        return x.contiguous(memory_format=torch.channels_last)

    model = network("cuda").to(memory_format=torch.channels_last)
    assert agree(ATTACKS["PGD"], "cuda", model, form).replayed == 4
    attack = PGD(model, steps=2, **FREE)
    for seed in range(3):
        x, y = batch(seed=seed, device="cuda")
        assert attack(form(x), y).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
def test_a_compiled_model_on_a_card(repeatable):
    model = torch.compile(network("cuda"))
    assert agree(ATTACKS["PGD"], "cuda", model).replayed >= 3


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [False, "auto"])
@every
def test_an_attack_never_waits(make, graph):
    if make is ATTACKS["at speed"] and graph is False:
        pytest.skip("a view is compared with the model at its first use")
    more = {"on": "cuda"} if make is ATTACKS["L2, per sample"] else {}
    model, attack = network("cuda"), make(graph=graph, compact=False, seed=0, **more)
    x, y = batch(device="cuda")
    for _ in range(3):
        attack.perturb(x, y, model=model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attack.perturb(x, y, model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(attack.graphs.replayed) == (graph == "auto")


def wait(self, x):
    return 0 * x.sum().item()


def refuse(self, x):
    torch.cuda.synchronize()  # PyTorch does not notice this wait, and CUDA ends the recording
    return 0


@pytest.mark.cuda
@pytest.mark.parametrize("act", [wait, refuse])
def test_a_model_that_cannot_be_recorded_on_a_card(act, repeatable):
    torch.manual_seed(0)
    model, attack = Strange(act).cuda(), PGD(steps=2, **FREE)
    for seed in range(4):
        x, y = batch(seed=seed, device="cuda")
        same(attack.perturb(x, y, model=model, draw=0), plain(attack, model, x, y))
    assert attack.graphs.why and not attack.graphs.recorded
    # PyTorch still works and can record again.
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(5, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    assert agree(ATTACKS["PGD"], "cuda").replayed == 4


@pytest.mark.cuda
def test_recordings_share_memory_but_not_results(repeatable):
    model = network("cuda")
    attacks = [PGD(steps=n, **FREE) for n in (2, 3)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    x, y = batch(64, device="cuda")
    expected = [plain(attack, model, x, y) for attack in attacks]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for attack, stream in zip(attacks, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(attack.perturb(x, y, model=model, draw=0))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    assert all(attack.graphs.replayed == 8 for attack in attacks)


def held():
    """Return the bytes of tensors on the GPU, without the workspaces of cuBLAS (one per stream)."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.cuda
def test_memory_is_given_back():
    model, attack = network("cuda"), PGD(steps=2, **FREE)
    x, y = batch(512, device="cuda")
    attack.perturb(x, y, model=model)
    before = held()
    for _ in range(3):
        attack.perturb(x, y, model=model)
    assert attack.graphs.replayed == 2 and held() > before
    del attack
    assert held() == before
